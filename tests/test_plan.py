"""Plans: strict data, there and back, and every way of being wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcar.errors import PlanError
from kvcar.fit.partition import regular_blocks
from kvcar.geometry import KVGeometry, Slot
from kvcar.plan import BitGroup, Block, Plan, Reuse

GEOMETRY = KVGeometry(
    layers=4,
    kv_heads=2,
    query_heads=4,
    head_dim=16,
    rotary=True,
    max_positions=512,
    sliding_layers=(1,),
    sliding_window=32,
)


def plan(**changes):
    blocks = tuple(
        Block(codec="linear", slots=b, groups=(BitGroup(bits=4, count=8),)) for b in regular_blocks(GEOMETRY, 2, None)
    )
    return Plan(**({"geometry": GEOMETRY, "blocks": blocks} | changes))


@given(
    st.integers(1, 3),
    st.sampled_from([None, 1, 2]),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]), st.integers(1, 50)),
        min_size=1,
        unique_by=lambda p: p[0],
    ),
    st.sampled_from(["model", "bfloat16", "float16"]),
)
def test_json_gives_the_same_plan_back(layers, heads, groups, dtype):
    ordered = tuple(BitGroup(bits=b, count=c) for b, c in sorted(groups, reverse=True))
    blocks = tuple(Block(codec="linear", slots=b, groups=ordered) for b in regular_blocks(GEOMETRY, layers, heads))
    made = Plan(geometry=GEOMETRY, blocks=blocks, exact_dtype=dtype)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()


def test_blocks_cover_every_codable_slot_once():
    for layers in (1, 2, 3):
        for heads in (None, 1, 2):
            covered = [slot for block in regular_blocks(GEOMETRY, layers, heads) for slot in block]
            assert sorted(covered) == sorted(GEOMETRY.slots())
    assert all(slot.layer != 1 for slot in GEOMETRY.slots()), "sliding layers are never coded"


def test_chains_of_reuse_end_at_the_stored_slot():
    block = Block(codec="linear", slots=(Slot(0, 0, "key"),), groups=(BitGroup(bits=4, count=8),))
    reuses = (
        Reuse(slot=Slot(2, 0, "key"), source=Slot(0, 0, "key")),
        Reuse(slot=Slot(3, 1, "key"), source=Slot(2, 0, "key")),
        Reuse(slot=Slot(3, 0, "value"), source=Slot(2, 1, "value")),
    )
    made = plan(blocks=(block,), reuses=reuses)
    assert made.stored_source[Slot(3, 1, "key")] == Slot(0, 0, "key")
    assert made.stored_source[Slot(3, 0, "value")] == Slot(2, 1, "value")
    assert made.coded_layers == (0, 2, 3)
    assert Slot(3, 1, "key") not in made.exact_slots
    assert Slot(2, 1, "value") in made.exact_slots


def edited(change):
    data = json.loads(plan().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=3), "version 3 is not known"),
        (lambda d: d.pop("format_version"), "version None is not known"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.pop("geometry"), "geometry"),
        (lambda d: d["blocks"][0]["groups"][0].update(bits=9), "1 to 8 bits or 16, not 9"),
        (lambda d: d["blocks"][0]["groups"][0].update(bits="4"), "bits"),
        (lambda d: d["blocks"][0]["groups"].append({"bits": 5, "count": 1}), "fall strictly"),
        (lambda d: d["blocks"][0].update(slots=[]), "slots"),
        (lambda d: d["blocks"][0]["slots"].append([1, 0, "key"]), "not a slot that this model can compress"),
        (lambda d: d["blocks"][0]["slots"].append([0, 7, "key"]), "not a slot"),
        (lambda d: d["blocks"][0]["slots"].append([0, 0]), "a slot is"),
        (lambda d: d["blocks"][0]["slots"].append([0, 0, "query"]), "a slot is"),
        (lambda d: d["blocks"][0]["slots"].append(d["blocks"][0]["slots"][0]), "twice"),
        (lambda d: d["blocks"][0]["slots"].append(d["blocks"][1]["slots"][0]), "claimed by"),
        (lambda d: d["reuses"].append({"slot": [3, 0, "key"], "source": [0, 0, "key"]}), "claimed by"),
        (lambda d: d.update(blocks=[], reuses=[{"slot": [0, 0, "key"], "source": [0, 0, "value"]}]), "keys reuse keys"),
        (lambda d: d.update(blocks=[], reuses=[{"slot": [0, 0, "key"], "source": [9, 0, "key"]}]), "does not have"),
        (
            lambda d: d.update(
                blocks=[],
                reuses=[
                    {"slot": [0, 0, "key"], "source": [2, 0, "key"]},
                    {"slot": [2, 0, "key"], "source": [0, 0, "key"]},
                ],
            ),
            "circle",
        ),
        (lambda d: d["cache"].update(window=65), "multiple of the page size, 64"),
        (lambda d: d["cache"].update(page_tokens=48), "multiple of 32"),
        (lambda d: d["cache"].update(sinks=-1), "sinks"),
        (lambda d: d.update(exact_dtype="int8"), "exact_dtype"),
    ],
)
def test_wrong_plans_are_refused_and_say_why(change, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"plan"'])
def test_what_is_no_plan_at_all(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format_version": ' + "9" * 5000 + "}", '{"a": ' * 900 + "1" + "}" * 900]
)
def test_texts_that_are_hard_to_read(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("odd", ["9" * 5000, ["x"] * 5000])
def test_messages_stay_short_whatever_a_stranger_wrote(odd):
    data = plan().model_dump(mode="json")
    for change in (
        lambda d: d["blocks"][0]["slots"].__setitem__(0, [0, odd, "key"]),
        lambda d: d.update(exact_dtype=odd),
        lambda d: d.update(cache=odd),
        lambda d: d.update(format_version=odd),
        lambda d: d.update({str(odd): 1}),
    ):
        changed = json.loads(json.dumps(data))
        change(changed)
        with pytest.raises(PlanError) as caught:
            Plan.from_data(changed)
        assert len(str(caught.value)) < 1000
