import jax
import jax.numpy as jnp
import numpy as np
import peers

from benchmarks import loss
from dino_jax import dino
from dino_jax.models import DINOHead


def test_the_peer_computes_our_loss():
    peers.import_timm()
    torch = peers.import_torch()
    from benchmarks import torch_peer

    images, K = 3, 16
    rng = np.random.default_rng(0)
    student = rng.normal(size=(images, 2 + torch_peer.LOCALS, K)).astype(np.float32)
    teacher, center = student[:, :2] + 0.1, rng.normal(size=K).astype(np.float32)
    q = dino.targets(jnp.asarray(teacher), jnp.asarray(center), torch_peer.TEACHER_TEMP)
    ours = dino.pair_loss(q, jnp.asarray(student), torch_peer.STUDENT_TEMP)

    by_view = [torch.from_numpy(x.swapaxes(0, 1).reshape(-1, K).copy()) for x in (student, teacher)]
    np.testing.assert_allclose(torch_peer.dino_loss(*by_view, torch.from_numpy(center)), ours, rtol=1e-5)


def test_the_straightforward_loss_is_ours():
    head = DINOHead(out_dim=64, hidden_dim=16, bottleneck_dim=8)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(4, loss.VIEWS, 12)), jnp.float32)
    params = head.init(jax.random.key(0), features[:1, :1])["params"]
    ours, expected = (implementation(head, params, features) for implementation in (loss.ours, loss.straightforward))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
