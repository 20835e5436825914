"""The arithmetic of what one chunk of a prefill needs."""

from bundles import by_hand
from tiny import VOCABULARY, tiny_model
from transient import prefill_transient

from kvcar.geometry import Slot


def plan_and_config(**plan):
    model = tiny_model("llama")
    blocks = [tuple(Slot(layer, head, kind) for layer in (0, 1) for head in (0, 1)) for kind in ("key", "value")]
    return by_hand(model, blocks, bits=4, **plan).plan, model.config


def test_what_is_held_and_what_each_phase_takes_is_counted_from_shapes():
    plan, config = plan_and_config()
    found = prefill_transient(plan, config, past_tokens=200, element_bytes=4, chunk=64)
    assert found.held == {
        "hidden states": 64 * 64 * 4,
        "mask": 64 * (200 + 64),
        "keys and values of the chunk": 64 * 2 * (2 * 2 * 16) * 4,
    }
    assert found.phases["mlp"] == 64 * (64 + 3 * 96) * 4
    assert found.phases["logits of one token"] == VOCABULARY * 4
    # 4 layers' width in two blocks: 64 latents each; 64 tokens are two pages of 32, of 4 bits a latent.
    assert found.phases["encoding"] == 64 * 2 * 64 * 4 + 64 * 128 * 5 + 2 * 32 * 128 // 2
    rows, exact, tile = 4 * 64, 32 + 32 + 4 + 64, 200
    decoded, mask = tile * 128 * 5 + 4 * tile * 32 * 4, rows // 2 * exact
    assert decoded > 5 * mask
    queries = 64 * 64 * 4 + 5 * rows * 16 * 4 + exact * 64 * 4
    assert found.phases["attention"] == queries + decoded
    # Scores exist where they are capped, as attention is not fused then.
    config.attn_logit_softcapping = 50.0
    capped = prefill_transient(plan, config, past_tokens=200, element_bytes=4, chunk=64)
    assert rows * tile * 4 + decoded > rows * exact * 4 + mask
    assert capped.phases["attention"] == queries + rows * tile * 4 + decoded
    assert found.nbytes == sum(found.held.values()) + max(found.phases.values())


def test_it_does_not_grow_with_the_past_but_for_the_mask():
    plan, config = plan_and_config()
    near, far = (prefill_transient(plan, config, past, 4, chunk=64) for past in (4096, 65536))
    assert near.phases == far.phases
    assert far.nbytes - near.nbytes == 64 * (65536 - 4096)


def test_batches_and_half_precision_scale_what_they_touch():
    plan, config = plan_and_config()
    one, two = (prefill_transient(plan, config, 200, 4, 64, batch) for batch in (1, 2))
    assert two.nbytes == 2 * one.nbytes
    half = prefill_transient(plan, config, 200, 2, 64)
    assert half.held["keys and values of the chunk"] * 2 == one.held["keys and values of the chunk"]
    assert half.phases["encoding"] == one.phases["encoding"]


def test_a_model_without_an_intermediate_size_has_the_usual_one():
    model = tiny_model("gpt2")
    plan = by_hand(model, [tuple(Slot(0, head, "key") for head in range(4))], bits=4).plan
    assert prefill_transient(plan, model.config, 0, 4, 64).phases["mlp"] == 64 * (64 + 3 * 256) * 4
