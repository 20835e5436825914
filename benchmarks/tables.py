"""Turn the records in ``results/`` into the tables in ``docs/results/``, and into the README's.

python benchmarks/tables.py
"""

from __future__ import annotations

from pathlib import Path

from compare_tables import compare_pages
from decode_tables import decode_pages
from families_tables import families_page
from figures_block import frontier_block
from frontier_tables import frontier_page
from gpu_instructions_tables import gpu_instructions_page
from gpu_tables import gpu_pages
from kinds_of_text_tables import kinds_of_text_page
from memory_tables import memory_page
from other_models_tables import other_models_block, other_models_page
from pages import load
from paper_tables import paper_page
from recall_tables import recall_pages
from serve_stored_tables import serve_stored_page
from serve_vllm_tables import serve_vllm_pages
from tests_tables import tests_page

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "results"
README = HERE.parent / "README.md"
BLOCKS = {"frontier": frontier_block, "other models": other_models_block}
"""Generated parts of documents that a person writes otherwise: ``<!-- figures: NAME -->`` to ``<!-- end -->``."""


def fidelity_page() -> str:
    """Quality against size."""
    lines = [
        "# Quality and bytes, stepped through the cache",
        "",
        "Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. Demo model (SmolLM2-135M-Instruct",
        "from a dequantised Q4_1 file, float32, CPU). Bytes are those of tensors that exist, sinks, window and unfilled room counted, against the model's",
        "own cache in bfloat16 at the same length. KL divergence in nats per token; ± is one standard error.",
        "",
        "| record | codec | layers per block | fitted on | tested on | context x windows | times smaller | KL divergence "
        "| same top-1 | perplexity full -> this | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in load("*.json", "fidelity"):
        fit = r["config"]["fit"]
        lines.append(
            f"| `{r['record']}` | {fit['options']['codec']} | {fit['options']['layers_per_block']} | {fit['text']}, "
            f"{fit['tokens']:,} tokens | {r['config']['text']} | {r['context']:,} x {r['windows']} | {r['times_smaller']:.2f} "
            f"| {r['kl_divergence']:.4f} ± {r['kl_divergence_stderr']:.4f} | {100 * r['same_top']:.1f} % "
            f"| {r['perplexity_full']:.3f} -> {r['perplexity']:.3f} "
            f"| {r['perplexity_ratio']:.4f} ± {r['perplexity_ratio_stderr']:.4f} |"
        )
    return "\n".join(lines) + "\n"


PAGES = {
    "fidelity.md": fidelity_page,
    "kinds-of-text.md": kinds_of_text_page,
    "memory.md": memory_page,
    "paper.md": paper_page,
    "frontier.md": frontier_page,
    "gpu-instructions.md": gpu_instructions_page,
    "tests.md": tests_page,
    "serve-stored.md": serve_stored_page,
    "families.md": families_page,
    "other-models.md": other_models_page,
}


def pages() -> dict[str, str]:
    """File name below ``docs/results`` -> content, of every page."""
    return (
        {name: make() for name, make in PAGES.items()}
        | compare_pages()
        | decode_pages()
        | gpu_pages()
        | recall_pages()
        | serve_vllm_pages()
    )


def with_figures(text: str) -> str:
    """A document with what stands between the markers of each block of ``BLOCKS`` made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- figures: {name} -->\n", "\n<!-- end -->"
        if begin in text:
            before, after = text.split(begin, 1)
            text = before + begin + make() + end + after.split(end, 1)[1]
    return text


def main() -> None:
    """Write all pages, and the README's figures."""
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, page in pages().items():
        (DOCS / name).write_text(page, encoding="utf-8")
        print(DOCS / name)
    README.write_text(with_figures(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
