"""How the assignments' tests compare, and say what is wrong: in the words of the task, with the
first place that differs, and the likely mistake where a known one gives the same numbers."""

import torch


def check(condition, words):
    """Raises AssertionError with `words` unless the condition holds."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(words)


def same(found, expected, what, tolerance=1e-10, likely=None):
    """Raises AssertionError unless `found` is `expected`: a tensor of the same type and shape, or a
    number (an int will do for a float), or a list. Numbers may differ by
    tolerance (1 + |expected|); 0 allows no difference.

    `what` names the value; `likely` is {a mistake, in words: what comes out of it}.
    """
    __tracebackhide__ = True
    words = difference(found, expected, tolerance)
    for mistake, wrong in (likely or {}).items() if words else ():
        if not difference(found, wrong, max(tolerance, 1e-6)):
            words += f". Likely mistake: {mistake}"
            break
    if words:
        raise AssertionError(f"{what}: {words}")


def difference(found, expected, tolerance):
    """Where `found` is not `expected`, in words; "" if nowhere."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor):
            return f"a tensor is wanted, not {short(found)}"
        if found.shape != expected.shape:
            return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
        if found.dtype != expected.dtype:
            return f"its type is {name(found.dtype)}, not {name(expected.dtype)}"
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list) or len(found) != len(expected):
            return f"it is {short(found)}, not a list of {len(expected)}"
        if not all(isinstance(item, bool | int | float) for item in (*found, *expected)):
            return "" if list(found) == list(expected) else (
                f"it is {short(found)}, not {short(list(expected))}")
    elif isinstance(expected, float):
        if isinstance(found, bool) or not isinstance(found, int | float):
            return f"a float is wanted, not {short(found)}"
    elif type(found) is not type(expected):
        return f"it is {short(found)}, not {short(expected)}"
    return first_difference(found, expected, tolerance)


def first_difference(found, expected, tolerance):
    """The same for numbers, of which there are equally many."""
    if expected is None or isinstance(expected, str):
        return "" if found == expected else f"it is {short(found)}, not {short(expected)}"
    a = torch.as_tensor(found).detach().double()
    b = torch.as_tensor(expected).detach().double()
    near = (a - b).abs() <= tolerance * (1 + b.abs())
    good = (a == b) | (near & b.isfinite())  # to infinity everything is near
    if good.all():
        return ""
    place = (~good).nonzero()[0].tolist()
    count = int((~good).sum())
    at = f" at {place}" if place else ""
    many = f" ({count} of {good.numel()} differ)" if good.numel() > 1 else ""
    yours, right = a[tuple(place)].item(), b[tuple(place)].item()
    digits = 6 if abs(yours - right) > 1e-5 * abs(right) else 16
    first = "the first number that differs" if good.numel() > 1 else "the number"
    return f"{first}{at} is {yours:.{digits}g} and should be {right:.{digits}g}{many}"


def short(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def name(dtype):
    return str(dtype).removeprefix("torch.")


def is_tensor(found, shape, dtype, what):
    """Raises AssertionError unless `found` is a tensor of this shape and type."""
    __tracebackhide__ = True
    check(isinstance(found, torch.Tensor), f"{what}: a tensor is wanted, not {short(found)}")
    check(tuple(found.shape) == tuple(shape),
          f"{what}: its shape is {tuple(found.shape)}, not {tuple(shape)}")
    check(found.dtype == dtype, f"{what}: its type is {name(found.dtype)}, not {name(dtype)}")


def refuses(call, *arguments, what):
    """Raises AssertionError unless the call raises ValueError."""
    __tracebackhide__ = True
    try:
        call(*arguments)
    except ValueError:
        return
    raise AssertionError(f"{what} must raise ValueError")
