"""How far from the reference's numbers we may be."""

import numpy as np


def assert_close(ours, arrays, key, meta):
    """Our array against the golden's, within 1e-4 of its largest value (and absolutely), or within twice of what the
    reference itself moves between float32 and float64 (meta.f64diff) where that is more.
    """
    expected = arrays[key]
    atol = max(1e-4 * min(1, np.abs(expected).max()), 2 * meta.get("f64diff", {}).get(key, 0))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=atol, err_msg=key)
