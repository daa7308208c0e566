"""How far from the reference's numbers we may be."""


def tolerance(meta, key):
    """1e-4, or twice what the reference itself moves between float32 and float64 (meta.f64diff) where that is more."""
    return {"rtol": 1e-4, "atol": max(1e-4, 2 * meta.get("f64diff", {}).get(key, 0)), "err_msg": key}
