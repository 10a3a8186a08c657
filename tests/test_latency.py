"""What is timed is what runs: the experts asked for, the routers that work, each routing once a round; and nothing stays behind."""

import numpy as np
import pytest
import torch
from conftest import make_blocks, make_converted, make_dense

from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import measure_latency, mixed_shares, random_pair, time_parts
from dynamoe_lab.evaluation import stopwatch as stopwatch_module
from dynamoe_lab.evaluation.overrule import forced_routing
from dynamoe_lab.evaluation.stopwatch import Stopwatch, Work, step_ids
from dynamoe_lab.models import decoder_layers, family_of

MIXED = mixed_shares((0.25, 0.5, 0.75, 1.0), 0.6)
ALL = ("router", "label", "full", 1, (0.0, 0.0, 1.0, 0.0), MIXED)
NAMES = ["router", "label", "full", "expert 1", "one expert", "mixed"]
PARTS = ["MLP", "router", "sorting", "attention", "head", "other"]
COLUMNS = ["run", "phase", "routing", "batch", "tokens", "threads", "device", "dtype", "pair", "seconds", "mlp_seconds"]
IDS = make_blocks(4, 24).ids


def state_of(*models) -> list:
    """All that measuring could leave behind: hooks, replaced methods, modes, draws to come."""
    state = []
    for model in models:
        for module in model.modules():
            names = {name for name in vars(module) if callable(vars(module)[name])}
            state.append((names, len(module._forward_hooks), len(module._forward_pre_hooks), module.training))
        if (routing := getattr(model, "routing", None)) is not None:
            shares = None if routing.shares is None else routing.shares.tolist()
            draws = [tuple(generator.get_state().tolist()) for generator in routing.generators or ()]
            state.append((routing.mode, routing.expert, shares, routing.collect, draws))
    return [*state, tuple(torch.get_rng_state().tolist())]


class Clock:
    """A clock that only moves where a module is told to take time."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        monkeypatch.setattr(stopwatch_module.time, "perf_counter", lambda: self.time)

    def spend(self, module, seconds: float, name: str = "forward") -> None:
        method = getattr(module, name)

        def slow(*args, **kwargs):
            self.time += seconds
            return method(*args, **kwargs)

        setattr(module, name, slow)


# --- measure_latency ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_table(family, phase):
    frame = measure_latency(
        make_dense(family), make_converted(family), phase=phase, batch=2, tokens=16, routings=ALL, pairs=2, steps=3, run="r"
    )
    assert list(frame.columns) == [*COLUMNS, "active_mlp_fraction", "ideal_share"]
    assert len(frame) == 2 * 7
    for _, rows in frame.groupby("pair"):
        assert sorted(rows["routing"]) == sorted(["dense", *NAMES]), "each once a round"
    setting = {"run": "r", "phase": phase, "batch": 2, "tokens": 16, "threads": torch.get_num_threads(), "device": "cpu"}
    assert all((frame[name] == value).all() for name, value in {**setting, "dtype": "float32"}.items())
    assert ((frame["seconds"] > frame["mlp_seconds"]) & (frame["mlp_seconds"] > 0)).all()
    assert (frame.groupby("routing")[["active_mlp_fraction", "ideal_share"]].nunique() == 1).all(axis=None)


def test_rounds_rotate_and_the_first_is_not_counted(monkeypatch):
    dense, model, ran = make_dense(), make_converted(), []
    run = Work.run

    def spy(work, **kwargs):
        ran.append("dense" if work.model is dense else work.model.routing.expert if work.model.routing.mode == "fixed" else "router")
        return run(work, **kwargs)

    monkeypatch.setattr(Work, "run", spy)
    frame = measure_latency(dense, model, tokens=8, routings=("router", 1), pairs=3)
    ran = ran[1:]  # what the routers choose is looked up once before
    assert [ran[start : start + 3] for start in range(0, 12, 3)] == [
        ["dense", "router", 1],
        ["router", 1, "dense"],
        [1, "dense", "router"],
        ["dense", "router", 1],
    ]
    assert frame["routing"].tolist() == ["router", "expert 1", "dense", "expert 1", "dense", "router", "dense", "router", "expert 1"]
    assert frame["pair"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_seconds_by_a_clock_of_our_own(family, phase, monkeypatch):
    """Three layers whose MLPs take 2 (dense) or 1 + 0.25 for the router, in forwards that take 10 besides."""
    dense, model, clock = make_dense(family), make_converted(family), Clock(monkeypatch)
    table = family_of(family)
    for layer in decoder_layers(dense):
        for name in ("fc1", "fc2") if family == "opt" else (table.mlp,):
            clock.spend(getattr(layer, name), 1.0 if family == "opt" else 2.0)
    for mlp in model.nested_mlps():
        clock.spend(mlp, 1.0)
        clock.spend(mlp.router, 0.25)
    for each in (dense, model):
        clock.spend(each.get_output_embeddings(), 10.0)
    frame = measure_latency(dense, model, phase=phase, tokens=8, routings=("router", "full"), pairs=1, steps=4)
    times = frame.set_index("routing")[["seconds", "mlp_seconds"]]
    assert times.loc["dense"].tolist() == [16, 6]
    assert times.loc["router"].tolist() == [13.75, 3.75]
    assert times.loc["full"].tolist() == [13, 3], "no router is asked"


def test_shares_by_hand():
    """Neurons 24, 48, 72, 96 of width 3 x 64; routers of 64 x 16 + 16 x 4 multiply-adds, where they run."""
    dense, model = make_dense(), make_converted()
    frame = measure_latency(dense, model, batch=4, tokens=24, ids=IDS, routings=ALL, pairs=1, seed=5).set_index("routing")
    router = (64 * 16 + 16 * 4) / (96 * 3 * 64)

    def mean_width(experts) -> float:
        return float((torch.stack(tuple(experts)).double() + 1).mean()) / 4

    told = {}
    for mode in ("label", "router"):
        model.set_routing(mode)
        with torch.no_grad():
            told[mode] = model(IDS, output_router_logits=True).experts
    with forced_routing(model, MIXED, rows=IDS.numel(), seed=5) as drawn:
        pass
    width = {
        "dense": 1.0,
        "router": mean_width(told["router"]),
        "label": mean_width(told["label"]),
        "full": 1.0,
        "expert 1": 0.5,
        "one expert": 0.75,
        "mixed": mean_width(drawn),
    }
    assert len({round(width[name], 6) for name in ("router", "label", "mixed")}) == 3
    for name, value in width.items():
        assert frame.loc[name, "active_mlp_fraction"] == pytest.approx(value), name
        asked = name in ("router", "label", "one expert", "mixed")
        work = (1.0 if name == "label" else value) + asked * router  # labels compute the full MLP
        assert frame.loc[name, "ideal_share"] == pytest.approx(work), name


def test_shares_of_decode_are_those_of_its_steps():
    model = make_converted()
    frame = measure_latency(make_dense(), model, phase="decode", batch=4, tokens=20, steps=4, ids=IDS, pairs=1).set_index("routing")
    with torch.no_grad():
        experts = torch.stack(model(IDS, output_router_logits=True).experts).view(3, 4, 24)[..., 20:]
    assert frame.loc["router", "active_mlp_fraction"] == pytest.approx(float((experts.double() + 1).mean()) / 4)


@torch.no_grad()
def test_decode_follows_a_prefill_under_the_first_routing():
    model, shares = make_converted(), []
    for first in (0, (0.0, 0.0, 0.0, 1.0)):
        frame = measure_latency(
            make_dense(), model, phase="decode", batch=4, tokens=20, steps=4, ids=IDS, pairs=1, routings=(first, "router")
        )
        shares.append(frame.set_index("routing").loc["router", "active_mlp_fraction"])
        work = Work(model, "decode", IDS, 20)
        model.set_routing(first if first == 0 else 3)
        work.prefill()
        model.set_routing("router")
        experts = torch.stack([torch.stack(output.experts) for output in work.run(output_router_logits=True)])
        assert shares[-1] == pytest.approx(float((experts.double() + 1).mean()) / 4)
    assert shares[0] != shares[1], "what is cached reaches the routers"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("fails_at", [None, 0, 2, 9])
def test_models_are_left_as_found(phase, fails_at, monkeypatch):
    dense, model = make_dense().train(), make_converted()
    model.set_routing("random", shares=torch.ones(3, 4), seed=1)
    with torch.inference_mode():
        model(IDS)  # the generators are under way
    model.train()
    for module in (dense.model.layers[0].self_attn, model.nested_mlps()[1].router):
        module.eval()
        module.train()
    before = state_of(dense, model)
    run, calls = Work.run, []

    def failing(work, **kwargs):
        calls.append(work)
        if len(calls) - 1 == fails_at:
            raise RuntimeError("out of memory")
        return run(work, **kwargs)

    monkeypatch.setattr(Work, "run", failing)
    settings = {"phase": phase, "tokens": 8, "routings": ALL, "pairs": 1, "steps": 2}
    if fails_at is None:
        measure_latency(dense, model, **settings)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            measure_latency(dense, model, **settings)
    assert state_of(dense, model) == before


# --- where the time goes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_parts_table(family, phase):
    for model, routing, name in ((make_dense(family), None, "dense"), (make_converted(family), MIXED, "mixed")):
        before = state_of(model)
        parts = time_parts(model, phase=phase, batch=4, tokens=20, routing=routing, repeats=2, run="r")
        assert list(parts.columns) == ["run", "routing", "phase", "batch", "tokens", "part", "seconds", "share"]
        assert parts["part"].tolist() == PARTS
        assert (parts[["run", "routing", "phase", "batch", "tokens"]] == ["r", name, phase, 4, 20]).all(axis=None)
        seconds = parts.set_index("part")["seconds"]
        assert (seconds[["MLP", "attention", "head", "other"]] > 0).all()
        assert (seconds[["router", "sorting"]] == 0).all() if name == "dense" else seconds["router"] > 0
        assert parts["share"].sum() == pytest.approx(1)
        assert np.allclose(parts["share"], parts["seconds"] / parts["seconds"].sum())
        assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_parts_by_a_clock_of_our_own(family, monkeypatch):
    """Layers of 1 second in the MLP, 0.25 in its router, 3 in attention; 10 in the head, 5 in the embedding."""
    model, clock = make_converted(family), Clock(monkeypatch)
    for layer, mlp in zip(decoder_layers(model), model.nested_mlps(), strict=True):
        clock.spend(mlp, 1.0)
        clock.spend(mlp.router, 0.25)
        clock.spend(layer.attention if family == "gpt_neox" else layer.self_attn, 3.0)
    clock.spend(model.get_output_embeddings(), 10.0)
    clock.spend(model.get_input_embeddings(), 5.0)
    one = (0.0, 1.0, 0.0, 0.0)
    for phase in ("prefill", "decode"):
        parts = time_parts(model, phase=phase, tokens=8, routing=one, repeats=1).set_index("part")
        assert parts["seconds"].tolist() == [3, 0.75, 0, 9, 10, 5]
        assert parts["share"].tolist() == pytest.approx([value / 27.75 for value in (3, 0.75, 0, 9, 10, 5)])
    assert time_parts(model, tokens=8, routing=1, repeats=1)["seconds"].tolist() == [3, 0, 0, 9, 10, 5]


def test_sorting_counts_where_tokens_are_mixed(family, monkeypatch):
    """A second to sort and two to restore the order, in each of three layers, in the MLP's place."""
    model, clock = make_converted(family), Clock(monkeypatch)
    for mlp in model.nested_mlps():
        clock.spend(mlp, 1.0, "sort_tokens")
        clock.spend(mlp, 2.0, "restore_order")
    parts = time_parts(model, batch=4, tokens=24, routing=MIXED, repeats=1).set_index("part")["seconds"]
    assert parts[["MLP", "sorting", "other"]].tolist() == [0, 9, 0]
    alike = time_parts(model, tokens=24, routing=(0.0, 1.0, 0.0, 0.0), repeats=1).set_index("part")["seconds"]
    assert alike["sorting"] == 3, "seeing that nothing is mixed is sorting, too"
    assert time_parts(model, tokens=24, routing=1, repeats=1).set_index("part").loc["sorting", "seconds"] == 0


def test_methods_are_timed_on_the_instance_only(monkeypatch):
    """What `sorting` is measured with: calls of one module's method, until the watch is closed, also by an error."""

    class Sorter(torch.nn.Module):
        def order(self, x, *, reverse):
            clock.time += 2.0
            return sorted(x, reverse=reverse)

    clock, one, other = Clock(monkeypatch), Sorter(), Sorter()
    with pytest.raises(KeyError), Stopwatch(torch.device("cpu")) as watch:  # noqa: PT012
        watch.watch_method("sorting", one, "order")
        assert one.order([2, 3, 1], reverse=True) == [3, 2, 1]
        other.order([1], reverse=False)
        assert watch.seconds == {"sorting": 2.0}
        raise KeyError
    assert "order" not in vars(one)


def test_parts_under_the_routing_as_it_is(monkeypatch):
    model = make_converted()
    for mode, name in (("label", "label"), (2, "expert 2"), ("full", "full")):
        model.set_routing(mode)
        assert set(time_parts(model, tokens=8, repeats=1)["routing"]) == {name}
        assert model.routing.mode == ("fixed" if mode == 2 else mode)
    before = state_of(model)
    monkeypatch.setattr(Work, "run", lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        time_parts(model, tokens=8, routing=MIXED)
    assert state_of(model) == before


def test_an_accelerator_is_waited_for(monkeypatch):
    waited = []
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda kind=kind: waited.append(kind))
    for kind in ("cuda", "cpu", "mps"):
        Stopwatch(torch.device(kind)).now()
    assert waited == ["cuda", "mps"]


# --- random models, bad input, the real model ---------------------------------------------------------------------------------------


def test_random_pair():
    state = torch.get_rng_state()
    dense, model = random_pair(128, 320, experts=(0.3, 1.0), layers=3, vocab_size=50, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [mlp.sizes for mlp in model.nested_mlps()] == [(96, 320)] * 3
    assert (dense.config.num_attention_heads, dense.config.vocab_size, dense.training, model.training) == (2, 50, False, False)
    again, other = random_pair(128, 320, experts=(0.3, 1.0), layers=3, vocab_size=50, seed=2)[1], random_pair(128, 320, vocab_size=50)[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(other.model.embed_tokens.weight, model.model.embed_tokens.weight)
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        model.set_routing("full")
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    assert len(measure_latency(dense, model, tokens=8, pairs=1)) == 2
    for width in (480, 224, 66):  # half of SmolLM2-360M, a quarter of Qwen2.5-0.5B, and a prime number of pairs
        config = random_pair(width, 64)[0].config
        assert width % (2 * config.num_attention_heads) == 0
        assert config.head_dim >= 64
    half = random_pair(64, 128, dtype="bfloat16")
    assert {each.dtype for each in half} == {torch.bfloat16}
    assert random_pair(48, 64, heads=3)[0].config.head_dim == 16
    for sizes, options in (((65, 64), {}), ((0, 64), {}), ((64, 64), {"heads": 5}), ((64, 64), {"layers": 0}), ((64, 2), {})):
        with pytest.raises(InputError, match=r"random_pair: .*(even width|different|sizes)|convert: .*sizes"):
            random_pair(*sizes, **options)
    with pytest.raises(InputError, match=r"random_pair: .*strictly increasing"):
        random_pair(64, 64, experts=(0.5, 0.25, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "train"}, "phase 'train': choose prefill or decode"),
        ({"pairs": 0}, "pairs = 0: give at least 1 round"),
        ({"tokens": 0}, "tokens = 0: give a whole number of at least 1"),
        ({"batch": -1}, "batch = -1: give"),
        ({"phase": "decode", "steps": 0}, "steps = 0: give"),
        ({"tokens": 129}, "129 positions are asked for, the model has 128"),
        ({"phase": "decode", "tokens": 125, "steps": 4}, "129 positions"),
        ({"ids": IDS, "batch": 5}, r"ids of shape \[4, 24\] are too few: give at least \[5, 16\]"),
        ({"ids": IDS[:, :9]}, r"ids of shape \[4, 9\] are too few"),
        ({"ids": IDS[0], "batch": 2}, r"ids of shape \[24\] are too few"),
        ({"ids": IDS.float()}, "ids: give a tensor or blocks of token ids below 128"),
        ({"ids": IDS + 128}, "ids: give a tensor or blocks of token ids below 128"),
        ({"ids": IDS.tolist()}, "ids: give a tensor or blocks of token ids below 128"),
        ({"batch": 1.5}, "batch = 1.5: give a whole number"),
        ({"pairs": 1.5}, "pairs = 1.5: give at least 1 round"),
        ({"routings": 1}, "routings = 1: give a list of routings"),
        ({"routings": [("a",) * 4]}, "shares are at least 0"),
        ({"routings": ()}, "give a list of routings"),
        ({"routings": "router"}, "give a list of routings"),
        ({"routings": ("router", "router")}, "one is given twice"),
        ({"routings": ("random",)}, "routing 'random': choose router, label, full, an expert from 0 to 3, or a tuple of 4 shares"),
        ({"routings": (4,)}, "routing 4: choose"),
        ({"routings": (True,)}, "routing True: choose"),
        ({"routings": ([0.25] * 4,)}, "or a tuple of 4 shares"),
        ({"routings": ((0.5, 0.5),)}, "has 2 shares, the model 4 experts"),
        ({"routings": ((0.5, 0.5, 0.5, 0.0),)}, "shares are at least 0 and sum to 1"),
        ({"routings": ((1.5, -0.5, 0.0, 0.0),)}, "shares are at least 0 and sum to 1"),
        ({"dense": make_converted}, "the first model, DynaMoELlamaForCausalLM, is a converted one; give its dense parent"),
        ({"model": make_dense}, "LlamaForCausalLM has no routers; convert it first"),
        ({"dense": lambda: make_dense("mistral")}, "mistral is not the family of dynamoe_llama"),
        ({"dense": lambda: make_dense(num_hidden_layers=2)}, "weights of other shapes"),
        ({"dense": lambda: make_dense(intermediate_size=48)}, "weights of other shapes"),
        ({"dense": lambda: make_dense(dtype="bfloat16")}, "dtype torch.bfloat16, the other torch.float32"),
    ],
)
def test_bad_input_in_one_line(change, message):
    models = {name: change.get(name, make)() for name, make in (("dense", make_dense), ("model", make_converted))}
    given = {"tokens": 16, "pairs": 1, **{name: value for name, value in change.items() if name not in models}}
    before = state_of(*models.values())
    with pytest.raises(InputError, match=f"^measure_latency: .*{message}") as caught:
        measure_latency(models["dense"], models["model"], **given)
    assert "\n" not in str(caught.value)
    assert state_of(*models.values()) == before


def test_bad_input_of_parts():
    with pytest.raises(InputError, match="time_parts: LlamaForCausalLM has no experts"):
        time_parts(make_dense(), routing="full", tokens=8)
    for change, message in (({"repeats": 0}, "repeats = 0"), ({"routing": "mixed"}, "routing 'mixed'"), ({"phase": ""}, "phase ''")):
        with pytest.raises(InputError, match=f"time_parts: {message}"):
            time_parts(make_converted(), tokens=8, **change)


@pytest.mark.real
def test_the_real_model():
    """SmolLM2 through all of it: the router is 5.6 % of a dense MLP's work. How long it takes is the benchmark's to say."""
    from dynamoe_lab.conversion import convert
    from dynamoe_lab.loading import load_model

    dense, _ = load_model("smollm2-135m")
    model = convert(dense, calibration=step_ids(dense, "test", phase="prefill", batch=1, tokens=64, steps=1, ids=None, seed=0))
    half = (0.0, 1.0, 0.0, 0.0)
    frame = measure_latency(dense, model, tokens=256, routings=(1, half), pairs=2)
    rows = frame.groupby("routing")[["ideal_share"]].first()
    assert rows.loc["one expert", "ideal_share"] == pytest.approx(0.556, abs=0.001)
    assert rows.loc["expert 1", "ideal_share"] == pytest.approx(0.5)
    assert (frame["seconds"] > frame["mlp_seconds"]).all()
    assert len(frame) == 6


def test_ids_are_rows_blocks_or_one_text():
    model = make_converted()
    asked = {"phase": "decode", "batch": 2, "tokens": 12, "steps": 3, "seed": 0}
    rows = step_ids(model, "test", ids=IDS, **asked)
    assert torch.equal(
        step_ids(model, "test", ids=make_blocks(4, 24, seed=1), **asked),
        step_ids(model, "test", ids=make_blocks(4, 24, seed=1).ids, **asked),
    )
    text = step_ids(model, "test", ids=IDS.flatten(), **asked)
    assert rows.shape == text.shape == (2, 15)
    assert torch.equal(text[:, :12], IDS.flatten()[:24].view(2, 12))
