"""torch's default initialisation of linear and convolution layers, which the reference keeps in a few places."""

from functools import partial

from flax import linen as nn

# uniform in +-1/sqrt(fan_in): variance 1 / (3 fan_in)
torch_uniform = partial(nn.initializers.variance_scaling, 1 / 3, "fan_in", "uniform")
