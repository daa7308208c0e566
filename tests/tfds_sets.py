"""Small TFDS sets for tests, written by TensorFlow Datasets itself."""

import pytest


def write_tfds(folder, image, **splits):
    """Writes a set with splits of these numbers of images, image(i) with label i % 3; returns its folder."""
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.core.registered.skip_registration():  # a second set of the same name is an error otherwise

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path, __module__ = None, "tests"  # TFDS searches the package of the class for files

            def _info(self):
                features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(count) for split, count in splits.items()}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {"image": image(i), "label": i % 3}

    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir
