"""Sources of images, the input pipeline on the host, and the augmentation on the device."""
