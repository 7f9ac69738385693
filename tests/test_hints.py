"""Hints of errors. Each test follows the hint of a wrong call, and the call is then right."""

import inspect
import itertools
import re

import numpy as np
import pytest

import carafepp

F32, F64 = np.float32, np.float64


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def sentence_of(function, arrays, params):
    """The error's sentence, or None if there is no error."""
    try:
        getattr(carafepp, function)(*arrays, **params)
    except (TypeError, ValueError) as error:
        return str(error)


def hint_of(sentence):
    """The hint at the end of a sentence, or None."""
    pattern = r"(Did you mean .*\?|\w[\w, ]+ exchanged\.|\w+ of that shape go to .*\.|Cast .*\.)$"
    found = re.search(pattern, sentence)
    return found and found[1]


def numbers_in(words):
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", words)}


def follow(hint, function, arrays, params):
    """Return the calls that a hint may mean, each as (function, arrays, params)."""
    if hint.startswith("Did you mean layout"):
        return [(function, arrays, {**params, "layout": hint[-6:-2]})]
    if hint.startswith("Did you mean"):
        return [(function, arrays, {**params, **numbers_in(hint)})]
    if hint.endswith("exchanged."):
        return [(function, list(order), params) for order in itertools.permutations(arrays)]
    if hint.startswith("Cast"):
        names = list(inspect.signature(getattr(carafepp, function)).parameters)
        dtype = re.search(r" to (\w+)", hint)[1]
        cast = [
            array.astype(dtype) if re.search(rf"\b{name}\b", hint) else array
            for name, array in zip(names, arrays, strict=False)
        ]
        return [(function, cast, params)]
    other, words = re.search(r"go to (\w+)(.*)\.", hint).groups()
    params = {**params, **numbers_in(words)}
    known = inspect.signature(getattr(carafepp, other)).parameters
    return [(other, arrays, {name: params[name] for name in params if name in known})]


X = zeros(2, 4, 6, 10)
M, L, D = zeros(2, 9, 12, 20), zeros(2, 36, 6, 10), zeros(2, 4, 12, 20)

# (function, arrays, params, hint)
MISTAKES = {
    "up": ("reassemble", [X, M], {}, "Did you mean up=2?"),
    "up, a crop": ("reassemble", [X, M[:, :, :11]], {"size": (11, 20)}, "Did you mean up=2?"),
    "up, backward": ("reassemble_backward", [D, X, M], {}, "Did you mean up=2?"),
    "up of logits": ("reassemble_with_logits", [X, L], {"kernel_size": 3}, "Did you mean up=2?"),
    "up of logits alone": ("normalize_masks", [zeros(2, 225, 6, 10)], {}, "Did you mean up=3?"),
    "down": ("reassemble", [X, zeros(2, 9, 3, 5)], {}, "Did you mean down=2?"),
    "down of logits": ("reassemble_with_logits", [X, zeros(2, 25, 3, 5)], {},
                       "Did you mean down=2?"),
    "down for up": ("reassemble", [X, M], {"down": 2}, "Did you mean up=2 and down=1?"),
    "3/2": ("reassemble", [X, zeros(2, 9, 9, 15)], {}, "Did you mean up=3 and down=2?"),
    "kernel_size": ("reassemble_with_logits", [X, zeros(2, 49, 6, 10)], {},
                    "Did you mean kernel_size=7?"),
    "kernel_size and up": ("reassemble_with_logits", [X, L], {},
                           "Did you mean up=2 and kernel_size=3?"),
    "kernel_size to normalize": ("normalize_masks", [L], {"up": 2}, "Did you mean kernel_size=3?"),
    "groups": ("reassemble", [X, zeros(2, 18, 6, 10)], {}, "Did you mean groups=2?"),
    "groups of logits": ("reassemble_with_logits", [X, zeros(2, 200, 6, 10)], {"up": 2},
                         "Did you mean groups=2?"),
    "padding": ("reassemble", [X, zeros(2, 9, 4, 8)], {}, "Did you mean padding=0?"),
    "layout": ("reassemble", [zeros(2, 6, 10, 4), zeros(2, 12, 20, 9)], {"up": 2},
               "Did you mean layout='NHWC'?"),
    "layout of one image": ("reassemble", [X[0], M[0]], {"up": 2, "layout": "NHWC"},
                            "Did you mean layout='NCHW'?"),
    "order": ("reassemble", [M, X], {"up": 2}, "features and masks seem to be exchanged."),
    "order, backward": ("reassemble_backward", [X, M, D], {"up": 2},
                        "grad_output, features, masks seem to be exchanged."),
    "logits for masks": ("reassemble", [X, L], {"up": 2},
                         "Logits of that shape go to reassemble_with_logits, with kernel_size=3."),
    "masks for logits": ("reassemble_with_logits", [X, M], {"up": 2},
                         "Masks of that shape go to reassemble."),
    "gradients of masks": ("reassemble_with_logits_backward", [D, X, M], {"up": 2},
                           "Masks of that shape go to reassemble_backward."),
    "float64 masks": ("reassemble", [X, M.astype(F64)], {"up": 2},
                      "Cast masks to float32: masks.astype(np.float32)."),
    "float64 features": ("reassemble", [X.astype(F64), M], {"up": 2},
                         "Cast features to float32: features.astype(np.float32)."),
    "a picture": ("reassemble", [X.astype(np.uint8), M.astype(np.uint8)], {"up": 2},
                  "Cast features and masks to float32."),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_call_that_follows_the_hint_is_right(name):
    function, arrays, params, hint = MISTAKES[name]
    sentence = sentence_of(function, arrays, params)
    assert hint_of(sentence) == hint, sentence
    assert None in [sentence_of(*call) for call in follow(hint, function, arrays, params)]


def test_every_hint_for_random_calls_is_right():
    random = np.random.default_rng(24)
    functions = ["reassemble", "reassemble_with_logits", "normalize_masks"]
    functions += [f"{function}_backward" for function in functions]
    followed = set()
    for _ in range(3000):
        function = str(random.choice(functions))
        up, down, groups = (int(random.choice([1, 1, 2, 3])) for _ in range(3))
        side = int(random.choice([1, 3, 5, 7]))
        height, width = (int(n) for n in random.integers(1, 9, 2))
        high, wide = -(-height * up // down), -(-width * up // down)
        logits_size = -(-height // down), -(-width // down)
        params = {"up": up, "down": down, "groups": groups, "kernel_size": side}
        known = inspect.signature(getattr(carafepp, function)).parameters
        # Any parameter may be forgotten, and the axes may be in another order.
        params = {k: v for k, v in params.items() if k in known and random.random() < 0.7}
        channels = 2 * groups
        shapes = {
            "features": (1, channels, height, width),
            "masks": (1, groups * side**2, high, wide),
            "logits": (1, groups * side**2 * up**2, *logits_size),
            "grad_output": (1, channels, high, wide),
        }
        shapes["grad_masks"] = shapes["masks"]
        last = random.random() < 0.1
        arrays = []
        for name in list(known)[: function.count("_backward") + 1 + ("reassemble" in function)]:
            shape = shapes[name]
            shape = (*shape[:1], *shape[2:], shape[1]) if last else shape
            arrays.append(np.zeros(shape, F64 if random.random() < 0.05 else F32))
        if random.random() < 0.1:
            random.shuffle(arrays)
        sentence = sentence_of(function, arrays, params)
        hint = hint_of(sentence or "")
        if hint:
            calls = follow(hint, function, arrays, params)
            assert None in [sentence_of(*call) for call in calls], (sentence, params)
            followed.add(re.sub(r"\d+|\w+_\w+", "", hint))
    assert len(followed) >= 15, followed


def test_no_hint_where_nothing_fits():
    for shape in ((2, 9, 6, 9), (2, 9, 100, 20), (1, 9, 12, 20), (2, 0, 12, 20)):
        assert hint_of(sentence_of("reassemble", [X, zeros(*shape)], {"up": 2})) is None


def test_no_hint_where_the_result_is_wrong():
    sentence = sentence_of("reassemble", [X, M], {"up": 2, "out": zeros(2, 4, 6, 10)})
    assert sentence == (
        "[reassemble] out must have shape (N, C, H', W') = (2, 4, 12, 20); got (2, 4, 6, 10)."
    )


def test_a_cast_in_the_words_of_pytorch(torch):
    x, m = torch.from_numpy(X), torch.from_numpy(M.astype(F64))
    sentence = sentence_of("reassemble", [x, m], {"up": 2})
    assert sentence.endswith("got float64. Cast masks to float32: masks.to(torch.float32).")
    x = torch.zeros(X.shape, requires_grad=True)
    sentence = sentence_of("reassemble", [x, torch.from_numpy(M)], {})
    assert sentence.endswith("Did you mean up=2?")


# ---- keywords of other libraries ----

# (function, keyword, its value, end of the sentence)
KEYWORDS = {
    "scale_factor": ("reassemble", "scale_factor", 2, "Did you mean up=2?"),
    "half": ("reassemble", "scale_factor", 0.5, "Did you mean down=2?"),
    "3/2": ("reassemble_backward", "scale_factor", 1.5, "Did you mean up=3 and down=2?"),
    "a pair": ("reassemble", "scale_factor", (2.0, 2.0), "Did you mean up=2?"),
    "no ratio": ("reassemble", "scale_factor", "1/0", "Did you mean up?"),
    "no number": ("reassemble", "scale_factor", None, "Did you mean up?"),
    "no such ratio": ("reassemble", "scale_factor", 2**0.5, "Did you mean up?"),
    "no down": ("normalize_masks", "scale_factor", 0.5, "Its parameters are logits, up, "
                "kernel_size, groups, normalizer, size, layout, out."),
    "group": ("reassemble", "group", 2, "Did you mean groups?"),
    "group_size": ("reassemble_with_logits_backward", "group_size", 2, "Did you mean groups?"),
    "up_kernel": ("reassemble_with_logits", "up_kernel", 5, "Did you mean kernel_size?"),
    "spelling": ("normalize_masks_backward", "normaliser", "none", "Did you mean normalizer?"),
    "typo": ("output_size", "padings", 0, "Did you mean padding?"),
    "nothing alike": ("reassemble", "mode", "bilinear", "Its parameters are features, masks, up, "
                      "down, groups, size, layout, padding, out."),
    "of other functions": ("reassemble", "kernel_size", 3, "Its parameters are features, masks, "
                           "up, down, groups, size, layout, padding, out."),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_keyword_of_another_library(name):
    function, keyword, value, end = KEYWORDS[name]
    known = list(inspect.signature(getattr(carafepp, function)).parameters.values())
    arrays = [X for parameter in known if parameter.default is inspect.Parameter.empty][:-1]
    with pytest.raises(TypeError) as caught:
        getattr(carafepp, function)(*arrays, **{keyword: value})
    assert str(caught.value) == (
        f"[{function}] got an unexpected keyword argument {keyword!r}. {end}"
    )


def test_a_keyword_of_another_module(torch):
    for keyword, value, meant in (
        ("scale_factor", 2, "up=2"),
        ("c_mid", 16, "compressed_channels"),
    ):
        with pytest.raises(TypeError, match=rf"\[CARAFE\] .*{keyword}.* Did you mean {meant}\?"):
            carafepp.torch.CARAFE(8, **{keyword: value})
