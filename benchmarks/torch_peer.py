"""The peer: DINO in plain PyTorch with timm's ViT, as fast as its own means make it.

As the official code does the step: one backbone call a crop size, the head over all views, every pair of views its own
cross-entropy, a clip for each tensor, AdamW, the teacher's average. Unlike it: fused attention and AdamW, foreach for
clip and average, `torch.compile` (default mode) on demand; on a GPU bfloat16 autocast. Crops come ready-made, which
ours have still to make in their step.
"""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import environment

GLOBAL, LOCAL, LOCALS = 224, 96, 8
STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM, TEACHER_MOMENTUM, CLIP = 0.1, 0.04, 0.9, 0.996, 3.0


class Head(nn.Module):
    """The projection head: MLP 2048, 2048, 256, unit length, weight-normalized prototypes with gain 1."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        layers = [nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(256, out_dim, bias=False))
        self.last_layer.parametrizations.weight.original0.data.fill_(1)
        self.last_layer.parametrizations.weight.original0.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, dim] -> logits [n, K]."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """Backbone and head; groups of equally large crops [n_i, 3, s, s] -> logits [sum n_i, K]."""

    def __init__(self, arch: str, out_dim: int, drop_path_rate: float):
        super().__init__()
        options = {"num_classes": 0, "dynamic_img_size": True, "drop_path_rate": drop_path_rate}
        self.backbone = timm.create_model(f"{arch}_patch16_224", **options)
        self.head = Head(self.backbone.num_features, out_dim)

    def forward(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """See the class."""
        return self.head(torch.cat([self.backbone(x) for x in groups]))


def dino_loss(student: torch.Tensor, teacher: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over pairs of a teacher's and another student's view (the official DINOLoss)."""
    views = (student.float() / STUDENT_TEMP).log_softmax(-1).chunk(2 + LOCALS)
    targets = ((teacher.float() - center) / TEACHER_TEMP).softmax(-1).detach().chunk(2)
    pairs = [(-q * view).sum(-1).mean() for i, q in enumerate(targets) for v, view in enumerate(views) if v != i]
    return torch.stack(pairs).mean()


class Trainer:
    """A student, its teacher, the optimizer; `step()` on one fixed batch of random crops."""

    def __init__(self, arch: str, batch: int, out_dim: int, compiled: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.student = Network(arch, out_dim, drop_path_rate=0.1).to(self.device)
        self.teacher = Network(arch, out_dim, drop_path_rate=0.0).to(self.device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        self.averaged = [t for t, s in pairs if s.requires_grad]
        matrices = [p for p in self.trained if p.ndim > 1]
        others = [p for p in self.trained if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.04}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-4 * batch / 256, fused=True)
        self.center = torch.zeros(1, out_dim, device=self.device)
        draw = lambda views, side: torch.randn(views * batch, 3, side, side, device=self.device)  # noqa: E731
        self.crops = [draw(2, GLOBAL), draw(LOCALS, LOCAL)]
        # Forward, loss and backward are compiled; the rest is a few fused or foreach calls already.
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                teacher = self.teacher(self.crops[:1])
            student = self.student(self.crops)
        return dino_loss(student, teacher, self.center), teacher.float().mean(0, keepdim=True)

    def step(self) -> None:
        """One step; returns when the device is done."""
        loss, mean = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in self.trained]
        factors = torch._foreach_add(torch._foreach_norm(grads), 1e-6)
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, CLIP)
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_(grads, factors)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.trained, 1 - TEACHER_MOMENTUM)
            self.center.lerp_(mean, 1 - CENTER_MOMENTUM)
        environment.wait_for_torch()


def feature_extraction(arch: str, batch: int, compiled: bool) -> Callable[[], None]:
    """A call that takes `batch` images of 224 pixels through the backbone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = timm.create_model(f"{arch}_patch16_224", num_classes=0).to(device).eval()
    images = torch.randn(batch, 3, 224, 224, device=device)
    apply = torch.compile(backbone) if compiled else backbone

    def run():
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            apply(images)
        environment.wait_for_torch()

    return run
