"""Bundles on disk: whole or not at all, checked on the way in, tied to their model."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from bundles import by_hand, fit_options, fitted
from safetensors.torch import load_file, save_file
from tiny import tiny_model, token_ids

import kvcar
from kvcar.bundle import CODECS_FILE, PLAN_FILE, Bundle
from kvcar.bundle.files import FILES, manifest_digest
from kvcar.codecs import CODECS
from kvcar.errors import BundleError, ModelMismatchError, PlanError
from kvcar.geometry import Slot

MODEL = tiny_model("llama")


@pytest.fixture(scope="module")
def bundle():
    return fitted(MODEL, times_smaller=4, layers_per_block=2)


@pytest.fixture
def folder(bundle, tmp_path):
    return bundle.save_pretrained(tmp_path / "bundle")


@pytest.mark.parametrize("codec", list(CODECS))
def test_every_codec_comes_back_as_it_was(codec, tmp_path):
    options = {
        "identity": {"bits": 4.5},
        "autoencoder": {"bits": 4, "steps": 3},
        "linear8": {"bits": 3, "metric": "effect"},
    }.get(codec, {"bits": 3})
    made = fitted(MODEL, codec=codec, **options)
    again = Bundle.from_pretrained(made.save_pretrained(tmp_path / "b"))
    assert (again.plan, again.model, again.fit) == (made.plan, made.model, made.fit)
    for a, b in zip(again.blocks, made.blocks, strict=True):
        x = torch.randn(5, 32)
        assert torch.equal(a.codec.decode(a.quantizer.latents(a.quantizer.codes(a.codec.encode(x)))),
                           b.codec.decode(b.quantizer.latents(b.quantizer.codes(b.codec.encode(x)))))  # fmt: skip


def test_a_loaded_bundle_generates_the_same(bundle, folder):
    with kvcar.attach(MODEL, bundle):
        expected = MODEL.generate(token_ids(90), max_new_tokens=20, do_sample=False)
    with kvcar.attach(MODEL, folder):
        assert torch.equal(MODEL.generate(token_ids(90), max_new_tokens=20, do_sample=False), expected)


def test_saving_is_deterministic(bundle, tmp_path):
    first, second = (bundle.save_pretrained(tmp_path / name) for name in "ab")
    for name in (PLAN_FILE, CODECS_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def edit_manifest(folder, change):
    path = folder / PLAN_FILE
    data = json.loads(path.read_text())
    change(data)
    data["sha256"] = manifest_digest(data)  # so that only the checks behind it can notice
    path.write_text(json.dumps(data))


def edit_codecs(folder, change):
    """Change tensors and fix the checksum, so that only the checks behind it can notice."""
    tensors = load_file(folder / CODECS_FILE)
    change(tensors)
    save_file(tensors, folder / CODECS_FILE)
    digest = hashlib.sha256((folder / CODECS_FILE).read_bytes()).hexdigest()
    edit_manifest(folder, lambda d: d.update(codecs_sha256=digest))


def test_truncated_and_tampered_codecs_are_refused(folder):
    path = folder / CODECS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BundleError, match="truncated or was changed"):
        Bundle.from_pretrained(folder)
    changed = bytearray(whole)
    changed[-5] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(BundleError, match="truncated or was changed"):
        Bundle.from_pretrained(folder)
    path.write_bytes(b"not safetensors")
    edit_manifest(folder, lambda d: d.update(codecs_sha256=hashlib.sha256(b"not safetensors").hexdigest()))
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        Bundle.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.encoder"), "lacks its tensor 'encoder'"),
        (lambda t: t.update({"blocks.1.mean": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda t: t.update({"blocks.0.decoder": t["blocks.0.decoder"].half()}), "float16, but the format has float32"),
        (lambda t: t["blocks.0.encoder"].fill_(torch.nan), "NaN or infinity"),
        (lambda t: t["blocks.0.decoder"].fill_(-1e30), r"holds 1e\+30"),
        (lambda t: t["blocks.0.quantizer.scale"].zero_(), "not positive"),
        (lambda t: t["blocks.0.quantizer.scale"].fill_(1e-40), "not positive"),
        (lambda t: t.update({"blocks.0.more": torch.zeros(3)}), "has a tensor 'more'"),
        (lambda t: t.update({"blocks.99.mean": torch.zeros(3)}), "'blocks.99.mean', which no block"),
        (lambda t: t.update({"surprise": torch.zeros(3)}), "'surprise', which no block"),
        (
            lambda t: t.update({"blocks.0.mean": torch.zeros(64, dtype=torch.int64)}),
            "int64, but the format has float32",
        ),
        (lambda t: t.update({"blocks.0.mean": torch.tensor(0.0)}), r"shape \(\)"),
        (lambda t: t.update({"blocks.0.encoder": torch.zeros(0, 0)}), r"shape \(0, 0\)"),
        (lambda t: t.update({"fingerprint.values": torch.zeros(3, 3)}), r"shape \(3, 3\)"),
        (lambda t: t.pop("fingerprint.values"), "lacks its tensor 'values'"),
    ],
)
def test_codecs_that_do_not_fit_the_plan_are_refused(folder, change, message):
    edit_codecs(folder, change)
    with pytest.raises(BundleError, match=message):
        Bundle.from_pretrained(folder)


def test_a_raw_latent_must_not_be_scaled(tmp_path):
    slots = tuple(Slot(0, h, "key") for h in (0, 1))
    folder = by_hand(MODEL, [slots], bits=[16, 4]).save_pretrained(tmp_path / "b")
    edit_codecs(folder, lambda t: t["blocks.0.quantizer.scale"].fill_(2.0))
    with pytest.raises(BundleError, match="raw latent"):
        Bundle.from_pretrained(folder)


def test_unknown_versions_and_codecs_are_refused(folder):
    edit_manifest(folder, lambda d: d["plan"]["blocks"][0].update(codec="magic"))
    with pytest.raises(PlanError, match="uses codec 'magic'"):
        Bundle.from_pretrained(folder)
    edit_manifest(folder, lambda d: d.update(format_version=99))
    with pytest.raises(PlanError, match=r"format 99, and this kvcar reads format 2; upgrade"):
        Bundle.from_pretrained(folder)
    edit_manifest(folder, lambda d: d.update(format_version=1))
    with pytest.raises(PlanError, match=r"format 1, and this kvcar reads format 2; fit the bundle again"):
        Bundle.from_pretrained(folder)
    edit_manifest(folder, lambda d: (d.update(format_version=2), d["plan"].update(format_version=7)))
    with pytest.raises(PlanError, match="version 7"):
        Bundle.from_pretrained(folder)


def test_folders_that_are_no_bundles(tmp_path):
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no plan\.json"):
        Bundle.from_pretrained(tmp_path)
    (tmp_path / PLAN_FILE).write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")], ids=["missing", "truncated"])
def test_errors_are_of_public_kinds(folder, damage):
    """A traceback names the class of its error, also where an engine prints it in a process of its own."""
    damage(folder / CODECS_FILE)
    with pytest.raises(BundleError) as error:
        Bundle.from_pretrained(folder)
    assert type(error.value) is BundleError


def test_a_pickle_is_never_opened(folder):
    torch.save({"blocks.0.encoder": torch.zeros(1)}, folder / CODECS_FILE)
    digest = hashlib.sha256((folder / CODECS_FILE).read_bytes()).hexdigest()
    edit_manifest(folder, lambda d: d.update(codecs_sha256=digest))
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        Bundle.from_pretrained(folder)


CODECS_OF_STRANGERS = {
    "identity": {"order": torch.zeros(32, dtype=torch.int32)},
    "autoencoder": {"encoder.first": torch.zeros(32), "decoder.second_bias": torch.zeros(31)},
}


@pytest.mark.parametrize("codec", CODECS_OF_STRANGERS)
def test_every_tensor_of_every_codec_is_checked(codec, tmp_path):
    folder = fitted(MODEL, codec=codec, bits=4, **({"steps": 1} if codec == "autoencoder" else {})).save_pretrained(
        tmp_path / "bundle"
    )
    names = [name for name in load_file(folder / CODECS_FILE) if name.startswith("blocks.0.")]
    assert {name.removeprefix("blocks.0.") for name in names if "quantizer" not in name} == set(CODECS[codec].stored)
    for name in names:
        for change in (
            lambda t, name=name: t.pop(name),
            lambda t, name=name: t.update({name: t[name].double()}),
            lambda t, name=name: t.update({name: t[name][None]}),
            lambda t, name=name: t.update({name: t[name][:-1]}),
            *(lambda t, name=name, value=value: t.update({name: torch.zeros_like(t[name]) + value})
              for value in (torch.nan, torch.inf, 3e38) if "order" not in name),
        ):  # fmt: skip
            shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
            edit_codecs(tmp_path / "other", change)
            with pytest.raises(BundleError):
                Bundle.from_pretrained(tmp_path / "other")
    for name, tensor in CODECS_OF_STRANGERS[codec].items():
        shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        edit_codecs(tmp_path / "other", lambda t, name=name, tensor=tensor: t.update({f"blocks.0.{name}": tensor}))
        with pytest.raises(BundleError):
            Bundle.from_pretrained(tmp_path / "other")


def test_a_dtype_that_torch_does_not_have(folder):
    path = folder / CODECS_FILE
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"F4" ', 1))
    edit_manifest(folder, lambda d: d.update(codecs_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        Bundle.from_pretrained(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900, '{"format_version": ' + "9" * 5000 + "}", "\ufeff{}", ""]
)
def test_manifests_that_are_hard_to_read(folder, text):
    (folder / PLAN_FILE).write_text(text)
    with pytest.raises((BundleError, PlanError)):
        Bundle.from_pretrained(folder)


@pytest.mark.parametrize("field", ["name", "architecture"])
def test_half_a_surrogate_pair_is_no_text(folder, field):
    edit_manifest(folder, lambda d: d["model"].update({field: "\ud800"}))
    with pytest.raises(BundleError, match="surrogates not allowed"):
        Bundle.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
@pytest.mark.parametrize("name", [PLAN_FILE, CODECS_FILE])
def test_a_pipe_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.from_pretrained(folder)


def test_a_path_with_a_nul(bundle):
    with pytest.raises(BundleError, match=r"no bundle at|is no path"):
        Bundle.from_pretrained("a\0b")
    with pytest.raises(BundleError, match="is no path"):
        bundle.save_pretrained("a\0b")


def test_geometries_that_would_fill_memory(folder):
    for change in (
        lambda g: g.update(layers=4096, kv_heads=4096, query_heads=4096),
        lambda g: g.update(sliding_layers=[7]),
        lambda g: g.update(sliding_layers=[1, 1]),
        lambda g: g.update(sliding_window=2**40),
    ):
        shutil.copytree(folder, folder.with_name("other"), dirs_exist_ok=True)
        edit_manifest(folder.with_name("other"), lambda d, change=change: change(d["plan"]["geometry"]))
        with pytest.raises(PlanError):
            Bundle.from_pretrained(folder.with_name("other"))


def test_the_wrong_model_is_refused_and_says_what_differs(bundle):
    with pytest.raises(ModelMismatchError, match="layers: 6 instead of 4"):
        kvcar.attach(tiny_model("llama", num_hidden_layers=6), bundle)
    with pytest.raises(ModelMismatchError, match="sampled weights differ"):
        kvcar.attach(tiny_model("llama", seed=1), bundle)
    light = tiny_model("llama")
    with torch.no_grad():
        for parameter in light.parameters():
            parameter += 1e-4
    with pytest.raises(ModelMismatchError, match="sampled weights differ"):
        kvcar.attach(light, bundle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_same_weights_in_another_dtype_are_welcome(bundle, dtype):
    model = tiny_model("llama", dtype=dtype)
    with kvcar.attach(model, bundle):
        assert model.generate(token_ids(100), max_new_tokens=5, do_sample=False).shape == (1, 105)


def test_what_is_there_is_not_overwritten_unasked(bundle, folder, tmp_path):
    before = (folder / PLAN_FILE).read_bytes()
    other = bundle.with_figures({"more": 1})
    with pytest.raises(BundleError, match="already holds a bundle"):
        bundle.save_pretrained(folder)
    assert (folder / PLAN_FILE).read_bytes() == before
    other.save_pretrained(folder, overwrite=True)
    assert Bundle.from_pretrained(folder).figures["more"] == 1
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(BundleError, match="not a bundle"):
        bundle.save_pretrained(tmp_path / "diary", overwrite=True)
    assert (tmp_path / "diary" / "monday.txt").exists()


def test_an_unwritable_place_is_told(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write to"):
        bundle.save_pretrained(tmp_path / "file" / "bundle")


def test_options_that_make_no_sense_are_refused():
    from kvcar.errors import InputError

    for wrong, message in [
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"bits": 3.0, "times_smaller": 4.0}, "not both"),
        ({"bits": 0.0}, "above 0"),
        ({"bits": 17.0}, "at most 16"),
        ({"times_smaller": -1.0}, "above 1"),
        ({"latent_bits": 12}, "1 to 8, or 16"),
        ({"steps": -1}, "negative"),
        ({"window": 33, "page_tokens": 64}, "multiple of the page size, 64"),
        ({"page_tokens": 48}, "multiple of 32"),
        ({"page_tokens": 64, "window": 64, "sinks": 65}, "sinks must be 0 to 64"),
        ({"profile": "small"}, "profile and max_kl search the structure"),
        ({"key_latents": 3}, "together"),
        ({"key_latents": 3, "value_latents": 3, "times_smaller": 4.0}, "no times_smaller"),
    ]:
        with pytest.raises(InputError, match=message):
            fit_options(**wrong)


def test_a_flipped_bit_in_the_manifest_is_noticed(folder):
    path = folder / PLAN_FILE
    text = path.read_text()
    assert '"window": 32' in text
    path.write_text(text.replace('"window": 32', '"window": 96'))
    with pytest.raises(BundleError, match="was changed"):
        Bundle.from_pretrained(folder)


def test_figures_come_back_and_are_on_the_card(bundle, tmp_path):
    assert bundle.figures["times_smaller"] > 3
    card = (bundle.save_pretrained(tmp_path / "a") / "README.md").read_text()
    assert "Not measured" in card
    assert "| 512 |" in card
    assert "base_model" not in card, "'tiny' is no name on the hub"
    names = ("kl_divergence", "same_top", "perplexity_full", "perplexity", "perplexity_ratio")
    held_out = {n + s: 0.125 for n in names for s in ("", "_stderr")} | {
        "tokens": 99,
        "context": 50,
        "times_smaller": 4.0,
    }
    measured = bundle.with_figures({"held_out": held_out, "curve": [[3.0, 0.5]]})
    folder = measured.save_pretrained(tmp_path / "b")
    assert Bundle.from_pretrained(folder).figures == measured.figures
    assert "| KL divergence (nats per token) | 0.12500 | 0.12500 |" in (folder / "README.md").read_text()
    assert Bundle.from_pretrained(folder).digest == bundle.digest, "contexts stay readable whatever was measured"


def test_bundles_are_pushed_to_the_hub_and_loaded_from_it(bundle, tmp_path, monkeypatch):
    hub, asked = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            asked.append(token)

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, revision, commit_message, create_pr):
            assert sorted(p.name for p in folder_path.iterdir()) == sorted(allow_patterns) == sorted(FILES)
            shutil.copytree(folder_path, hub / repo_id)

    def download(repo_id, allow_patterns, revision, **options):
        asked.append(revision)
        if not (hub / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing of that name")
        return str(hub / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert bundle.push_to_hub("me/b", token="secret") == "https://huggingface.co/me/b"
    for source, revision in (("me/b", None), ("me/b@v2", "v2")):
        again = Bundle.from_pretrained(source)
        assert (again.plan, again.figures) == (bundle.plan, bundle.figures)
        assert asked[-1] == revision
    with pytest.raises(BundleError, match=r"no folder me/c.*nothing of that name"):
        Bundle.from_pretrained("me/c")
    assert asked[0] == "secret"
