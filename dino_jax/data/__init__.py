"""Sources of images, the host pipeline, and the crops made on the device."""
