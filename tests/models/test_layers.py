import jax
import jax.numpy as jnp
import numpy as np
import peers

from dino_jax.models.layers import gelu


def test_as_pytorch_computes_it():
    torch = peers.import_torch()
    x = np.linspace(-6, 6, 1_001, dtype=np.float32)
    theirs = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(gelu(jnp.asarray(x)), theirs, atol=1e-6)


def test_bfloat16_rounds_only_the_result():
    x = jnp.linspace(-6, 6, 1_001).astype(jnp.bfloat16)
    exact = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    assert gelu(x).dtype == jnp.bfloat16
    # 2^-9 is half a unit in the last place of bfloat16.
    np.testing.assert_allclose(gelu(x).astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
