"""What README shows of the public API, run as it is written."""

import re
from pathlib import Path

import numpy as np
from peers import import_timm, import_torch
from PIL import Image
from skimage import data

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_every_file_that_the_documents_name_exists():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "results.md"]
    named = {
        (document.name, path)
        for document in documents
        for path in re.findall(r"\b(?:tests|benchmarks|configs|dino_jax)/[\w/]+\.(?:py|md|npz)", document.read_text())
    }
    assert not {(document, path) for document, path in named if not (ROOT / path).exists()}


def test_the_python_of_use_pretrained_weights(tmp_path, monkeypatch):
    torch, timm = import_torch(), import_timm()
    section = README.read_text(encoding="utf-8").split("## Use pretrained weights")[1].split("\n## ")[0]
    [program] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "dino_deitsmall16_pretrain.pth")
    Image.fromarray(data.astronaut()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    found: dict = {}
    exec(compile(program, "README.md", "exec"), found)
    features, blocks = found["features"], found["blocks"]
    assert (features.cls.shape, features.patches.shape, features.grid) == ((1, 384), (1, 196, 384), (14, 14))
    assert len(blocks) == 4
    np.testing.assert_allclose(blocks[-1].cls, features.cls, rtol=1e-5, atol=1e-5)
    assert found["attention"].shape == (1, 6, 197, 197)
