"""What experiments/paper_table.py reads back: rows, and what a training took. A file that says
something else is refused in one line."""

import json
import math

import command


def read_json(path, check):
    """A JSON file of a dict that `check` finds nothing wrong with. Raises ValueError if it is
    something else, or OSError."""
    try:
        content = json.loads(command.read_bytes(path))
        if not isinstance(content, dict) or not check(content):
            raise ValueError("what it has to say is not there, or is not a number")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not what this command writes ({command.one_line(error)}): "
                         "remove it, or choose another --out") from error
    return content


def is_number(value, least=0.0):
    return type(value) in (int, float) and least <= value < math.inf


def read_training(path):
    """What the training of a router took. Raises ValueError if the file says something else."""
    return read_json(path, is_training)


def is_training(content):
    """Whether this is what a training took. A system may not say the peak of its memory."""
    return all(is_number(content[key]) for key in ("seconds", "images")) and (
        content["peak_memory"] is None or is_number(content["peak_memory"]))


def is_row(content):
    """Whether this is a row, as `measure` writes it."""
    about, computed = content["about"], content["computed"]
    numbers = [value for value in content.values() if type(value) in (int, float)]
    return isinstance(about, dict) and len(computed) == about["steps"] and (
        all(type(count) is int and count >= 0 for count in computed)
        and all(is_number(value) for value in numbers) and content["cur"] < 1
        and all(is_number(content[key]) for key in ("error", "fid", "cache_mb"))
        and all(is_number(content[key], 1e-12) for key in ("seconds", "faster", "gflop"))
        and (content["training"] == {} or is_training(content["training"])))
