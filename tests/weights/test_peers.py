"""The features of PyTorch's own models from their own files, and ours from files that we write for them."""

import numpy as np
import pytest
from peers import (
    assert_equal,
    convert,
    import_timm,
    import_torch,
    import_torchvision,
    import_transformers,
    randomized,
    run,
)

from dino_jax.weights.backbone import load_backbone

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of features of the order of 1, after 12 blocks or 50 layers in float32


@pytest.fixture(scope="module")
def torch():
    torch = import_torch()
    with torch.no_grad():
        yield torch


@pytest.fixture(scope="module")
def timm(torch):
    return import_timm()


@pytest.fixture(scope="module")
def transformers(torch):
    return import_transformers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def small(timm, folder):
    """timm's ViT-S/16 and its file."""
    from safetensors.torch import save_file

    model = randomized(timm.create_model("vit_small_patch16_224.dino", num_classes=0))
    save_file(model.state_dict(), folder / "small.safetensors")
    return model, folder / "small.safetensors"


@pytest.fixture(scope="module")
def vit_model(transformers):
    """transformers' ViT-S/16, with LayerNorm's eps as the reference has it."""
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    return randomized(transformers.ViTModel(transformers.ViTConfig(**shape, layer_norm_eps=1e-6)))


def randomized_convnet(model):
    """The same with the statistics of a photograph in its batch norms."""
    for module in randomized(model).modules():
        module.momentum = None  # the average of what has been seen
    run(model.train(), photograph(224))
    return model.eval()


def photograph(size):
    """float32 [1, size, size, 3], normalized."""
    from skimage import data

    crop = data.astronaut()[:size, 100 : 100 + size] / 255
    return ((crop - 0.45) / 0.225)[None].astype(np.float32)


def assert_same_features(ours, theirs):
    """theirs: tokens [1, 1+N, D] of a ViT, pooled [1, D] of a convnet."""
    theirs = theirs.numpy()
    assert 0.3 < np.sqrt(np.mean(theirs**2)) < 3  # else the tolerance says nothing
    ours = ours.cls if theirs.ndim == 2 else np.concatenate([ours.cls[:, None], ours.patches], axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_timm_vit_from_its_file(small):
    model, path = small
    images = photograph(224)
    assert_same_features(load_backbone(path)(images), run(model.forward_features, images))


def test_timm_vit_at_the_size_that_timm_resized_it_to(timm, small, folder):
    from safetensors.torch import save_file

    source = {"file": str(small[1]), "num_classes": 0}
    model = timm.create_model(
        "vit_small_patch16_224.dino", pretrained=True, pretrained_cfg_overlay=source, img_size=320, num_classes=0
    ).eval()
    assert model.pos_embed.shape == (1, 1 + 20 * 20, 384)
    save_file(model.state_dict(), folder / "small320.safetensors")
    images = photograph(320)
    backbone = load_backbone(folder / "small320.safetensors")
    assert backbone.config["image_size"] == 320
    assert_same_features(backbone(images), run(model.forward_features, images))


def test_timm_vit_with_small_patches(timm, torch, folder):
    model = randomized(timm.create_model("vit_base_patch8_224.dino", num_classes=0))
    torch.save(model.state_dict(), folder / "base8.pth")
    images = photograph(224)
    assert_same_features(load_backbone(folder / "base8.pth")(images), run(model.forward_features, images))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_resnet50_from_its_file(timm, torch, folder, library):
    if library == "timm":
        model = timm.create_model("resnet50", num_classes=0)
    else:
        model = import_torchvision().models.resnet50()
        model.fc = torch.nn.Identity()
    randomized_convnet(model)
    torch.save(model.state_dict(), folder / f"{library}.pth")
    images = photograph(224)
    assert_same_features(load_backbone(folder / f"{library}.pth")(images), run(model, images))


XCITS = [("small_12", 16), ("small_12", 8), ("medium_24", 16), ("medium_24", 8)]


@pytest.mark.parametrize(("size", "patch"), XCITS)
def test_timm_xcit_from_and_to_its_file(timm, folder, size, patch):
    from safetensors.torch import load_file, save_file

    model = randomized_convnet(timm.create_model(f"xcit_{size}_p{patch}_224", num_classes=0))
    source = folder / f"xcit_{size}_{patch}.safetensors"
    save_file(model.state_dict(), source)
    backbone = load_backbone(source)
    assert (backbone.config["arch"], backbone.patch_size) == (f"xcit_{size}", patch)
    for image in (photograph(128), photograph(128)[:, :96]):
        assert_same_features(backbone(image), run(model.forward_features, image))
    tensors = load_file(convert(source, folder / f"back_{source.name}", "timm"))
    counters = {name: tensor for name, tensor in tensors.items() if name.endswith("num_batches_tracked")}
    assert_equal(tensors, model.state_dict() | counters)


def test_transformers_vit_from_its_folder(vit_model, folder):
    vit_model.save_pretrained(folder / "vit_model")
    images = photograph(224)
    assert_same_features(load_backbone(folder / "vit_model")(images), run(vit_model, images).last_hidden_state)


def test_transformers_vit_at_a_size_that_it_interpolates(transformers, torch, vit_model, folder):
    larger = transformers.ViTModel(transformers.ViTConfig(**vit_model.config.to_dict() | {"image_size": 320}))
    positions = vit_model.embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 20 * 20, 384), 320, 320)
    larger.load_state_dict(vit_model.state_dict() | {"embeddings.position_embeddings": positions})
    larger.save_pretrained(folder / "vit_model320")
    images = photograph(320)
    theirs = run(lambda x: vit_model(x, interpolate_pos_encoding=True), images).last_hidden_state
    assert_same_features(load_backbone(folder / "vit_model320")(images), theirs)


@pytest.fixture(scope="module")
def ours(small, folder):
    """An export of ours, of timm's ViT-S/16."""
    return convert(small[1], folder / "ours", "orbax")


@pytest.fixture(scope="module")
def for_transformers(ours, folder):
    return convert(ours, folder / "for_transformers", "hf")


def test_our_vit_in_timm(timm, small, ours, folder):
    from safetensors.torch import load_file

    model, images = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval(), photograph(224)
    tensors = load_file(convert(ours, folder / "for_timm.safetensors", "timm"))
    model.load_state_dict(tensors, strict=True)
    assert_same_features(load_backbone(ours)(images), run(model.forward_features, images))
    assert_equal(tensors, small[0].state_dict())


def test_our_vit_in_transformers(transformers, small, ours, for_transformers, folder):
    from safetensors.torch import load_file

    model, report = transformers.AutoModel.from_pretrained(
        for_transformers, add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    images = photograph(224)
    assert_same_features(load_backbone(ours)(images), run(model.eval(), images).last_hidden_state)
    back = convert(for_transformers, folder / "back.safetensors", "timm")
    assert_equal(load_file(back), small[0].state_dict())


def test_transformers_prepares_images_as_our_card_says(transformers, ours, for_transformers):
    from PIL import Image
    from skimage import data

    processor = transformers.AutoImageProcessor.from_pretrained(for_transformers)
    picture = Image.fromarray(data.coffee())
    theirs = processor(picture, return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
    backbone = load_backbone(ours)
    # torchvision's resize rounds to the next of 256 levels now and then.
    level = 1.01 / 255 / min(backbone.card["preprocessing"]["std"])
    np.testing.assert_allclose(theirs, backbone.preprocess([picture]), rtol=0, atol=level)


def test_our_resnet_in_timm(timm, folder):
    from safetensors.torch import load_file, save_file

    model = randomized_convnet(timm.create_model("resnet18", num_classes=0))
    save_file(model.state_dict(), folder / "resnet18.safetensors")
    ours = convert(folder / "resnet18.safetensors", folder / "resnet18", "orbax")
    tensors = load_file(convert(ours, folder / "resnet18_for_timm.safetensors", "timm"))
    again, images = timm.create_model("resnet18", num_classes=0).eval(), photograph(160)
    again.load_state_dict(tensors, strict=True)
    assert_same_features(load_backbone(ours)(images), run(again, images))
    counters = {name: tensor for name, tensor in tensors.items() if name.endswith("num_batches_tracked")}
    assert_equal(tensors, model.state_dict() | counters)
