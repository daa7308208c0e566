import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from benchmarks import hlo, loss
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
    ours = dino.loss(q, jnp.asarray(student), torch_peer.STUDENT_TEMP)

    by_view = [torch.from_numpy(x.swapaxes(0, 1).reshape(-1, K).copy()) for x in (student, teacher)]
    np.testing.assert_allclose(torch_peer.dino_loss(*by_view, torch.from_numpy(center)), ours, rtol=1e-5)


@pytest.mark.slow
def test_the_straightforward_loss_is_ours():
    head = DINOHead(out_dim=64, hidden_dim=16, bottleneck_dim=8)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(4, loss.VIEWS, 12)), jnp.float32)
    params = head.init(jax.random.key(0), features[:1, :1])["params"]
    ours, expected = (implementation(head, params, features) for implementation in (loss.ours, loss.straightforward))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_kernels_of_a_gpu_program():
    # A loop of three turns takes a row of a stack, multiplies it by cuBLAS and puts the doubled result into a stack.
    program = """HloModule jit_step
%take (stack: f32[3,4,8], turn: s32[]) -> f32[4,8] {
  %stack = f32[3,4,8]{2,1,0} parameter(0)
  %turn = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,4,8]{2,1,0} dynamic-slice(%stack, %turn, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %bitcast = f32[4,8]{1,0} bitcast(%row)
}
%put (into: f32[3,4,16], result: f32[4,16], turn: s32[]) -> f32[3,4,16] {
  %into = f32[3,4,16]{2,1,0} parameter(0)
  %result = f32[4,16]{1,0} parameter(1)
  %turn = s32[] parameter(2)
  %doubled = f32[4,16]{1,0} add(%result, %result)
  %as_row = f32[1,4,16]{2,1,0} bitcast(%doubled)
  %zero = s32[] constant(0)
  ROOT %stacked = f32[3,4,16]{2,1,0} dynamic-update-slice(%into, %as_row, %turn, %zero, %zero)
}
%body (state: (s32[], f32[3,4,8], f32[8,16], f32[3,4,16])) -> (s32[], f32[3,4,8], f32[8,16], f32[3,4,16]) {
  %state = (s32[], f32[3,4,8]{2,1,0}, f32[8,16]{1,0}, f32[3,4,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %rows = f32[3,4,8]{2,1,0} get-tuple-element(%state), index=1
  %weights = f32[8,16]{1,0} get-tuple-element(%state), index=2
  %results = f32[3,4,16]{2,1,0} get-tuple-element(%state), index=3
  %one = f32[4,8]{1,0} fusion(%rows, %i), kind=kLoop, calls=%take, metadata={op_name="jit(step)/jvp(ViT)/while/x"}
  %call = (f32[4,16]{1,0}, s8[1024]{0}) custom-call(%one, %weights), custom_call_target="__cublas$gemm", backend_config={"lhs_contracting_dimensions":["1"]}, metadata={op_name="jit(step)/transpose(jvp(ViT))/y"}
  %product = f32[4,16]{1,0} get-tuple-element(%call), index=0
  %done = f32[3,4,16]{2,1,0} fusion(%results, %product, %i), kind=kLoop, calls=%put, metadata={op_name="jit(step)/jit(f)/ViT/z"}
  ROOT %next = (s32[], f32[3,4,8]{2,1,0}, f32[8,16]{1,0}, f32[3,4,16]{2,1,0}) tuple(%i, %rows, %weights, %done)
}
ENTRY %main (p: (s32[], f32[3,4,8], f32[8,16], f32[3,4,16])) -> f32[3,4,16] {
  %p = (s32[], f32[3,4,8]{2,1,0}, f32[8,16]{1,0}, f32[3,4,16]{2,1,0}) parameter(0)
  %loop = (s32[], f32[3,4,8]{2,1,0}, f32[8,16]{1,0}, f32[3,4,16]{2,1,0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[3,4,16]{2,1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501
    found = list(hlo.kernels(*hlo.parse(program)))
    row, weights, result, turn = 4 * 4 * 8, 4 * 8 * 16, 4 * 4 * 16, 4
    assert [(k.times, k.stage, k.moved) for k in found] == [
        (3, "student, loss", 2 * row + turn),
        (3, "backward", row + weights + result),
        (3, "teacher", 2 * result + turn),
    ]
    assert found[1].seconds == max(found[1].moved / hlo.BANDWIDTH, 2 * 4 * 8 * 16 / hlo.PEAK["f32"])
