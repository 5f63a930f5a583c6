"""Which points stand beside each other."""

from maskray.sweeps.axes import axes_of, main_axes, view
from maskray.sweeps.ranking import ranked
from sweep_results import accuracy, grid, results_of, sweep_config


def points_of(space, points=None, **config):
    made = sweep_config(space, **config)
    ordered = ranked(made, results_of(grid(space) if points is None else points, range(2), accuracy))
    return ordered, axes_of(made, ordered)


def test_an_axis_has_more_than_one_value_and_numbers_are_in_order():
    space = {"mask.ratio": [0.9, 0.5], "optim.name": ["lamb"], "model.kind": ["vit", "conv"], "seedless": [1, 2, 1]}
    _, axes = points_of(space)
    assert {axis.key: axis.values for axis in axes} == {
        "mask.ratio": (0.5, 0.9), "model.kind": ("vit", "conv"), "seedless": (1, 2)
    }  # fmt: skip
    assert [axis.is_numeric for axis in axes] == [True, False, True]


def test_a_value_that_points_have_and_the_config_no_more_is_one_too():
    _, (axis,) = points_of({"a.b": ["x"]}, [{"a.b": "x"}, {"a.b": "y"}])
    assert axis.values == ("x", "y")


def test_true_and_one_are_two_values_and_have_no_order():
    _, (axis,) = points_of({"a.b": [1, True, 1.5]})
    assert axis.values == (1, True, 1.5)
    assert not axis.is_numeric


def test_along_one_axis_the_others_are_as_at_the_best_point():
    space = {"mask.ratio": [0.5, 0.75], "model.decoder.depth": [1, 2, 4], "a.b": ["x", "y"]}
    points, axes = points_of(space)
    best = points[0].point
    seen = view(axes, points, ["model.decoder.depth"])
    assert sorted(one.point["model.decoder.depth"] for one in seen.points) == [1, 2, 4]
    assert {(one.point["mask.ratio"], one.point["a.b"]) for one in seen.points} == {(best["mask.ratio"], best["a.b"])}
    assert seen.fixed == {"mask.ratio": best["mask.ratio"], "a.b": best["a.b"]}
    assert seen.free == ()
    assert len(view(axes, points, ["model.decoder.depth", "a.b"]).cells()) == 6


def test_keys_that_were_drawn_together_vary_freely_and_a_grid_is_held():
    space = {
        "optim.base_lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-1},
        "a.b": {"kind": "choice", "values": [1, 2]},
    }
    space |= {"mask.ratio": [0.5, 0.75]}
    drawn = [{"optim.base_lr": 10.0**-n, "a.b": n % 2 + 1} for n in (1, 2, 3)]
    points, axes = points_of(
        space, [{**one, "mask.ratio": r} for one in drawn for r in (0.5, 0.75)], search={"kind": "random", "points": 3}
    )
    best = points[0].point
    along = view(axes, points, ["optim.base_lr"])
    assert (along.fixed, along.free) == ({"mask.ratio": best["mask.ratio"]}, ("a.b",))
    assert len(along.points) == 3
    held = view(axes, points, ["mask.ratio"])
    assert held.fixed == {key: best[key] for key in ("optim.base_lr", "a.b")}
    assert len(held.points) == 2
    choices = view(axes, points, ["a.b"]).cells()
    assert len(choices) == 2
    assert all(
        one
        == next(p for p in points if p.point["a.b"] == one.point["a.b"] and p.point["mask.ratio"] == best["mask.ratio"])
        for one in choices.values()
    )


def test_a_key_under_a_condition_is_compared_where_both_have_it():
    space = {
        "mask.kind": ["random", "block"],
        "mask.roll": {"kind": "grid", "values": [True, False], "when": {"mask.kind": "block"}},
    }
    both = [
        {"mask.kind": "random"},
        {"mask.kind": "block", "mask.roll": True},
        {"mask.kind": "block", "mask.roll": False},
    ]
    points, axes = points_of(space, both)
    plain = next(one for one in points if one.point["mask.kind"] == "random")
    blocks = [one for one in points if one.point["mask.kind"] == "block"]
    of_plain = view(axes, [plain, *blocks], ["mask.kind"])
    assert list(of_plain.cells().values()) == [plain, blocks[0]]  # of two blocks the better one
    assert of_plain.free == ("mask.roll",)
    of_block = view(axes, [blocks[0], plain, blocks[1]], ["mask.kind"])
    assert list(of_block.cells().values()) == [blocks[0], plain]
    assert of_block.fixed == {"mask.roll": blocks[0].point["mask.roll"]}
    assert len(view(axes, [blocks[0], plain, blocks[1]], ["mask.roll"]).cells()) == 2


def test_the_main_axes_are_the_first_two_and_listed_ones_before_drawn_ones():
    lr = {"kind": "uniform", "low": 0.1, "high": 0.2}
    choice = lambda *values: {"kind": "choice", "values": list(values)}  # noqa: E731
    points = [{"a.lr": 0.1, "a.b": 1, "a.c": 2}, {"a.lr": 0.2, "a.b": 2, "a.c": 3}]
    random = {"search": {"kind": "random", "points": 2}}
    _, axes = points_of({"a.lr": lr, "a.b": choice(1, 2), "a.c": choice(2, 3)}, points, **random)
    assert [axis.key for axis in main_axes(axes)] == ["a.b", "a.c"]
    of_one_c = [one | {"a.c": 2} for one in points]
    _, axes = points_of({"a.lr": lr, "a.b": choice(1, 2), "a.c": choice(2)}, of_one_c, **random)
    assert [axis.key for axis in main_axes(axes)] == ["a.lr", "a.b"]
    assert main_axes(axes[:1]) is None
