import pytest

from kdcache.dump.signals.dense import chosen_layers
from kdcache.errors import ModelError, RecipeError

LAYERS = {
    "all": ("all", range(4), (0, 1, 2, 3)),
    "all of attention": ("all", range(1, 4), (1, 2, 3)),
    "ascending": ([3, 1], range(4), (1, 3)),
    "from the end": ([-1, -4], range(4), (0, 3)),
    "from the end of attention": ([-1, -3], range(1, 4), (1, 3)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_by_hand(case):
    layers, known, expected = LAYERS[case]
    assert chosen_layers("h", layers, known, "the encoder of bert") == expected


@pytest.mark.parametrize(
    ("layers", "known", "error", "message"),
    [
        ([4], range(4), ModelError, "signals.h.layers has 4; the encoder of bert has 3 layers, so "
         "expected 0 to 3, or -4 to -1"),
        ([1, -5], range(4), ModelError, "signals.h.layers has -5; the encoder of bert has 3 "
         "layers, so expected 0 to 3, or -4 to -1"),
        ([0], range(1, 4), ModelError, "signals.h.layers has 0; the encoder of bert has 3 layers, "
         "so expected 1 to 3, or -3 to -1"),
        ([-4], range(1, 4), ModelError, "signals.h.layers has -4; the encoder of bert has 3 "
         "layers, so expected 1 to 3, or -3 to -1"),
        ([2, -2], range(4), RecipeError, "signals.h.layers is [2, -2], which names a layer twice; "
         "of the encoder of bert these are [2, 2]"),
    ],
)  # fmt: skip
def test_layers_that_are_not(layers, known, error, message):
    with pytest.raises(error) as caught:
        chosen_layers("h", layers, known, "the encoder of bert")
    assert str(caught.value) == message
