"""Weights of every form, loaded: the same tree whatever the file calls its tensors."""

import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

import dino_jax
from dino_jax import checkpoints
from dino_jax.errors import UserError
from dino_jax.models import DINOHead
from dino_jax.models.positions import resize_pos_embed
from dino_jax.models.registry import VARIANT
from dino_jax.weights import huggingface, load, official, tensor_files

CARD = {"arch": "vit_nano", "patch_size": 8, "in_channels": 3, "image_size": 40, "embed_dim": 64} | VARIANT
K = 32


def random_like(shapes, seed):
    """Weights that no initialization makes; variances stay positive."""
    rng = np.random.default_rng(seed)

    def draw(path, s):
        x = 0.3 * rng.standard_normal(s.shape, np.float32)
        return np.abs(x) + 0.5 if path[-1].key == "var" else x

    return jax.tree.map_with_path(draw, shapes)


def backbone_tensors(seed, architecture=CARD):
    variables = random_like(official.backbone_like(architecture), seed)
    return official.to_official(variables["params"]) | official.to_official(variables["batch_stats"])


def head_tensors(seed, **options):
    head = DINOHead(K, 48, 16, norm_last_layer=False, **options)
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 64)))
    variables = random_like(dict(shapes), seed)
    return official.to_official(variables["params"]) | official.to_official(variables.get("batch_stats", {}))


def prefixed(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


TEACHER, STUDENT = backbone_tensors(1), backbone_tensors(2)
HEADS = {"teacher": head_tensors(3), "student": head_tensors(4)}
CENTER = np.random.default_rng(5).standard_normal((1, K)).astype(np.float32)
FULL = {
    "student": prefixed("module.backbone.", STUDENT) | prefixed("module.head.", HEADS["student"]),
    "teacher": prefixed("backbone.", TEACHER) | prefixed("head.", HEADS["teacher"]),
    "dino_loss": {"center": CENTER},
    "optimizer": {"state": {"0": {"exp_avg": np.ones(3, np.float32)}}},
}
FORMS = {
    "bare": TEACHER,
    "data parallel": prefixed("module.", TEACHER),
    "multi-crop wrapper": FULL["teacher"],
    "full checkpoint": FULL,
    "full, both in data parallel": FULL | {"teacher": prefixed("module.", FULL["teacher"])},
    "under state_dict": {"state_dict": TEACHER},
    "with timm's classifier": TEACHER | {"head.weight": np.ones((5, 64)), "head.bias": np.ones(5)},
    "hugging face": huggingface.from_official(TEACHER),
    "hugging face, classifier": prefixed("vit.", huggingface.from_official(TEACHER))
    | {"classifier.weight": np.ones((5, 64))},
}


@pytest.fixture
def saved(tmp_path):
    """saved(tree) -> the path of a file that holds it."""

    def save(tree, name="weights.safetensors"):
        tensor_files.write(tmp_path / name, tree)
        return tmp_path / name

    return save


def assert_is(weights, tensors, part="backbone"):
    """A tree of one part holds exactly these tensors."""
    ours = official.to_official(weights.params[part]) | official.to_official(weights.stats[part])
    assert set(ours) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_teachers_backbone(saved, form, capsys):
    path = saved(FORMS[form])
    found = load.load_weights(path, training=False)
    assert found.card["architecture"] == CARD
    assert found.card["preprocessing"]["crop"] == 40
    assert_is(found.teacher, TEACHER)
    assert (found.student, found.center) == (None, None)
    assert ("left out" in capsys.readouterr().err) == ("classifier" in form)
    assert dino_jax.load_backbone(path)(jnp.zeros((1, 40, 40, 3))).cls.shape == (1, 64)


def test_a_full_checkpoint_keeps_student_heads_and_center(saved):
    found = load.load_weights(saved(FULL))
    assert_is(found.teacher, TEACHER)
    assert_is(found.teacher, HEADS["teacher"], "head")
    assert_is(found.student, STUDENT)
    assert_is(found.student, HEADS["student"], "head")
    np.testing.assert_array_equal(found.center, CENTER[0])


def test_what_is_wrapped_or_has_no_teacher_is_found(saved, capsys):
    found = load.load_weights(saved({"state_dict": FULL, "epoch": np.int64(3)}))
    np.testing.assert_array_equal(found.center, CENTER[0])
    assert_is(found.teacher, HEADS["teacher"], "head")
    found = load.load_weights(saved({"student": FULL["student"]}))
    assert_is(found.teacher, STUDENT)
    assert found.student is None
    assert "has no teacher: using its student" in capsys.readouterr().err
    found = load.load_weights(saved(TEACHER | prefixed("head.", HEADS["teacher"])))
    assert_is(found.teacher, HEADS["teacher"], "head")
    assert "head" not in load.load_weights(saved(FULL), heads=False).teacher.params


@pytest.mark.parametrize(
    "stack", ["_orig_mod.", "module._orig_mod.", "state_dict.model.", "model.module.backbone.", "backbone._orig_mod."]
)
def test_prefixes_of_wrappers_in_any_order_are_removed(saved, stack):
    assert_is(load.load_weights(saved(prefixed(stack, TEACHER))).teacher, TEACHER)


def test_a_moving_average_beside_the_weights_is_taken(saved, capsys):
    found = load.load_weights(saved({"state_dict": STUDENT, "state_dict_ema": TEACHER, "epoch": np.int64(3)}))
    assert_is(found.teacher, TEACHER)
    assert "using state_dict_ema" in capsys.readouterr().err


def test_sharded_hugging_face_weights(tmp_path):
    card = {"architecture": CARD, "preprocessing": {"resize": 60, "crop": 40, "mean": [0.1] * 3, "std": [0.3] * 3}}
    huggingface.write_folder(tmp_path / "hf", TEACHER, card)
    whole = tmp_path / "hf" / "model.safetensors"
    names = list(tensors := {name: np.array(x) for name, x in tensor_files.read(whole).items()})
    whole.unlink()
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        tensor_files.write(tmp_path / "hf" / file, {name: tensors[name] for name in part})
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    assert_is(load.load_weights(tmp_path / "hf").teacher, TEACHER)
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002"):
        load.load_weights(tmp_path / "hf")
    for text in ("[]", "{}", '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": 3}', "\xff"):
        index.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="model.safetensors.index.json"):
            load.load_weights(tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("blocks.0.gamma_1", "a BEiT or CaiT"),
        ("dist_token", "a distilled DeiT"),
        ("rope_embed.periods", "a DINOv3 ViT"),
        ("storage_tokens", "a DINOv3 ViT"),
    ],
)
def test_networks_that_only_look_like_ours_are_named(saved, name, what):
    with pytest.raises(UserError, match=f"holds {what}"):
        load.load_weights(saved(TEACHER | {name: np.ones((1, 4, 64), np.float32)}))


@pytest.mark.parametrize("options", [{"use_bn": True}, {"layers": 1}, {"layers": 2}])
def test_heads_of_other_builds_are_read_off_their_tensors(saved, options):
    tensors = head_tensors(6, **options)
    found = load.load_weights(saved(prefixed("backbone.", TEACHER) | prefixed("head.", tensors)))
    assert_is(found.teacher, tensors, "head")


def test_a_convnet_comes_with_its_statistics_and_without_its_classifier(saved):
    architecture = {"arch": "resnet18", "patch_size": None, "in_channels": 3, "image_size": 224, "embed_dim": 512}
    tensors = backbone_tensors(1, architecture)
    found = load.load_weights(saved(official.with_counters(tensors) | {"fc.weight": np.ones((9, 512))}))
    assert found.card["architecture"] == architecture
    assert_is(found.teacher, tensors)


def test_an_antialiased_resnet_is_refused_though_its_tensors_are_a_plain_ones(saved, tmp_path):
    architecture = {"arch": "resnet18", "patch_size": None, "in_channels": 3, "image_size": 224, "embed_dim": 512}
    tensors = backbone_tensors(1, architecture)
    with pytest.raises(UserError, match="anti-aliasing"):
        load.load_weights(saved(tensors).rename(tmp_path / "resnetblur18-84f4748f.safetensors"))
    folder = tmp_path / "hub"
    folder.mkdir()
    saved(tensors).rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "resnetaa18", "num_classes": 1000}')
    with pytest.raises(UserError, match="resnetaa18, a ResNet with anti-aliasing"):
        load.load_weights(folder)


def test_incomplete_and_foreign_files_are_refused(saved, tmp_path):
    rest = {name: x for name, x in TEACHER.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(UserError, match="1 missing: blocks.1.norm2.bias"):
        dino_jax.load_backbone(saved(rest))
    names = huggingface.from_official(TEACHER)
    del names["encoder.layer.2.attention.attention.key.bias"]
    with pytest.raises(UserError, match="missing: blocks.2.attn.qkv.bias"):
        dino_jax.load_backbone(saved(names))
    with pytest.raises(UserError, match="1 not used: queue"):
        dino_jax.load_backbone(saved(FULL["teacher"] | {"queue": np.ones(3)}))
    with pytest.raises(UserError, match="also has queue"):
        dino_jax.load_backbone(saved(FULL | {"queue": np.ones(3)}))
    with pytest.raises(UserError, match="map to the same parameter: module.norm.bias, norm.bias|norm.bias, module"):
        dino_jax.load_backbone(saved(TEACHER | {"module.norm.bias": np.ones(64)}))
    with pytest.raises(UserError, match=r"norm.bias that are not finite weights"):
        dino_jax.load_backbone(saved(TEACHER | {"norm.bias": np.full(64, np.nan, np.float32)}))
    with pytest.raises(UserError, match=r"dino_loss.center \(1, 9\) for 32 prototypes"):
        load.load_weights(saved(FULL | {"dino_loss": {"center": np.ones((1, 9))}}))
    no_prototypes = {name: x for name, x in FULL["teacher"].items() if "weight_v" not in name}
    with pytest.raises(UserError, match=r"\(head\) are not .* missing: last_layer.weight_v"):
        load.load_weights(saved(no_prototypes))
    with pytest.raises(UserError, match="no such path"):
        dino_jax.load_backbone(tmp_path / "absent.pth")


def test_a_hugging_face_folder_says_what_tensors_cannot(tmp_path):
    card = {"architecture": CARD, "preprocessing": {"resize": 60, "crop": 40, "mean": [0.1] * 3, "std": [0.3] * 3}}
    huggingface.write_folder(tmp_path / "hf", TEACHER, card)
    found = load.load_weights(tmp_path / "hf")
    assert_is(found.teacher, TEACHER)
    assert {key: found.card["preprocessing"][key] for key in card["preprocessing"]} == card["preprocessing"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    sizes = {"arch": "vit", "embed_dim": 64, "depth": 3, "num_heads": 2}
    assert load.load_weights(tmp_path / "hf").card["architecture"] == CARD | sizes
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(UserError, match="5 attention heads do not divide its width 64: correct num_heads"):
        load.load_weights(tmp_path / "hf")


def test_another_image_size_is_what_the_network_does_with_such_images(saved):
    path, x = saved(TEACHER), jax.random.normal(jax.random.key(0), (2, 56, 56, 3))
    resized = dino_jax.load_backbone(path, image_size=56)
    assert resized.config["image_size"] == 56
    assert resized.preprocess([np.zeros((90, 80, 3), np.uint8)]).shape == (1, 56, 56, 3)
    assert resized.card["preprocessing"]["resize"] == 64  # as 256 is to 224
    expected = resize_pos_embed(TEACHER["pos_embed"], 7, 7, square=True)
    np.testing.assert_array_equal(resized.variables["params"]["pos_embed"], expected)
    np.testing.assert_allclose(resized(x).cls, dino_jax.load_backbone(path)(x).cls, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="image_size 50 is not a multiple of the patch size 8"):
        dino_jax.load_backbone(path, image_size=50)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_other_channels_say_of_gray_images_what_color_said(saved, channels):
    path, gray = saved(TEACHER), jax.random.normal(jax.random.key(0), (2, 40, 40, 1))
    changed = dino_jax.load_backbone(path, in_channels=channels)
    assert changed.config["in_channels"] == channels
    assert len(changed.card["preprocessing"]["mean"]) == channels
    expected = dino_jax.load_backbone(path)(jnp.repeat(gray, 3, axis=3)).cls
    np.testing.assert_allclose(changed(jnp.repeat(gray, channels, axis=3)).cls, expected, rtol=1e-4, atol=1e-4)


def test_a_convnets_first_kernel_changes_with_the_channels(saved):
    architecture = {"arch": "resnet18", "patch_size": None, "in_channels": 3, "image_size": 224, "embed_dim": 512}
    tensors = backbone_tensors(1, architecture)
    one = dino_jax.load_backbone(saved(tensors), in_channels=1)
    kernel = official.to_official(one.variables["params"])["conv1.weight"]
    np.testing.assert_allclose(kernel, tensors["conv1.weight"].sum(1, keepdims=True), rtol=1e-6)


@flax.struct.dataclass
class State:
    """What of a TrainState is read."""

    student: dict
    teacher: dict
    student_stats: dict
    teacher_stats: dict
    center: np.ndarray
    opt_state: dict


def test_a_run_gives_student_heads_and_center_of_its_checkpoint_even_beside_an_export(saved, tmp_path):
    found = load.load_weights(saved(FULL))
    config = tiny_config(crops__global_size=40)
    state = State(
        student=found.student.params,
        teacher=found.teacher.params,
        student_stats=found.student.stats,
        teacher_stats=found.teacher.stats,
        center=found.center,
        opt_state={"moments": np.ones(3)},
    )
    with checkpoints.open_manager(tmp_path / "run", config.checkpoint) as manager:
        checkpoints.save(manager, 7, state, config)
    variables = {"params": found.teacher.params["backbone"], "batch_stats": {}}
    card = checkpoints.model_card(config, step=7)
    checkpoints.write_export(tmp_path / "run" / "export", {"variables": variables}, card)

    run = load.load_weights(tmp_path / "run")
    assert_is(run.teacher, HEADS["teacher"], "head")
    assert_is(run.student, STUDENT)
    np.testing.assert_array_equal(run.center, CENTER[0])
    tensor_files.write(tmp_path / "run" / "model.safetensors", STUDENT)  # still read as a run
    assert_is(load.load_weights(tmp_path / "run").teacher, TEACHER)
    manifest = tmp_path / "run" / "checkpoints" / "7" / "manifest.json"
    manifest.write_text("{")  # no checkpoint is left, but an export is
    assert_is(load.load_weights(tmp_path / "run").teacher, TEACHER)
    alone = load.load_weights(tmp_path / "run" / "export")
    assert_is(alone.teacher, TEACHER)
    assert "head" not in alone.teacher.params
