"""DINOv2's features in transformers and timm from their own files, and ours from files that we write for them."""

import numpy as np
import pytest
from peers import assert_equal, convert, import_timm, import_torch, import_transformers, randomized, run

from dino_jax.weights.backbone import load_backbone

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of features of the order of 1, after 2 blocks in float32
KINDS = [(0, "mlp"), (4, "mlp"), (0, "swiglu"), (4, "swiglu")]
SIZES = [(518, 518), (224, 224), (126, 294)]


@pytest.fixture(scope="module")
def torch():
    torch = import_torch()
    with torch.no_grad():
        yield torch


def pictures(height, width):
    """float32 [1, height, width, 3], normalized."""
    from skimage import data

    crop = data.astronaut()[:height, :width]
    crop = np.pad(crop, ((0, height - len(crop)), (0, width - crop.shape[1]), (0, 0)), mode="reflect") / 255
    return ((crop - 0.45) / 0.225)[None].astype(np.float32)


def assert_same_features(backbone, model, registers, sizes=SIZES):
    """model: images -> tokens [1, 1+R+N, D]."""
    for height, width in sizes:
        images = pictures(height, width)
        theirs = run(model, images).numpy()
        assert 0.3 < np.sqrt(np.mean(theirs**2)) < 3  # else the tolerance says nothing
        tokens = backbone(images)
        assert tokens.registers.shape[1] == registers
        ours = np.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=f"{height} x {width}")


def transformers_model(transformers, registers, ffn):
    shape = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    shape |= {"use_swiglu_ffn": ffn == "swiglu"}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **shape)
        return randomized(transformers.Dinov2WithRegistersModel(config))
    return randomized(transformers.Dinov2Model(transformers.Dinov2Config(**shape)))


def timm_model(timm, registers, ffn, **changes):
    from timm.layers import SwiGLUPacked

    shape = {"embed_dim": 96, "depth": 2, "num_heads": 6, "img_size": 518, "num_classes": 0, "dynamic_img_size": True}
    if ffn == "swiglu":
        shape |= {"mlp_ratio": 2.66667 * 2, "mlp_layer": SwiGLUPacked, "act_layer": "silu"}
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    return randomized(timm.create_model(name, **shape | changes))


@pytest.mark.parametrize(("registers", "ffn"), KINDS)
def test_transformers_from_and_to_its_folders(torch, tmp_path, registers, ffn):
    transformers = import_transformers()
    model = transformers_model(transformers, registers, ffn)
    model.save_pretrained(tmp_path / "theirs")

    def tokens(model):
        return lambda x: model(x).last_hidden_state

    backbone = load_backbone(tmp_path / "theirs")
    assert_same_features(backbone, tokens(model), registers)

    ours = convert(tmp_path / "theirs", tmp_path / "ours", "hf")
    again, report = transformers.AutoModel.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(model)
    assert_equal(again.state_dict(), model.state_dict())
    assert_same_features(backbone, tokens(again.eval()), registers, SIZES[1:])


@pytest.mark.parametrize(("registers", "ffn"), KINDS)
def test_timm_from_and_to_its_files(torch, tmp_path, registers, ffn):
    from safetensors.torch import load_file, save_file

    timm = import_timm()
    model = timm_model(timm, registers, ffn)
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    ours = convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "timm", num_heads=6)
    tensors = load_file(ours)
    assert_equal(tensors, model.state_dict())
    backbone = load_backbone(ours)
    assert_same_features(backbone, model.forward_features, registers)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    assert load_backbone(tmp_path / "theirs.pth", num_heads=6).config == backbone.config


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_converts_official_files_as_we_do(torch, tmp_path, registers):
    """What timm makes of an official file, at the file's image size, and at the one that it resizes positions to."""
    from safetensors.torch import save_file

    timm = import_timm()
    like = timm_model(timm, registers, "mlp").state_dict()
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(1, 1 + 37 * 37, 96, generator=generator) * 0.5
    tensors = {name: x for name, x in like.items() if name != "reg_token"}
    tensors |= {"pos_embed": positions, "mask_token": torch.zeros(1, 96)}
    if registers:
        tensors["register_tokens"] = like["reg_token"]
    save_file(tensors, tmp_path / "official.safetensors")
    backbone = load_backbone(tmp_path / "official.safetensors", num_heads=6)
    assert backbone.config["antialias"] == (registers > 0)
    source = {"file": str(tmp_path / "official.safetensors"), "num_classes": 0}
    shape = {"embed_dim": 96, "depth": 2, "num_heads": 6, "num_classes": 0}
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    for side in (518, 224) if registers else (518,):  # without registers, timm resizes in another way
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, img_size=side, **shape)
        assert_same_features(backbone, model.eval().forward_features, registers, [(side, side)])
