"""The page of all results of the machine for PTX."""

from collections.abc import Iterable, Sequence

from tools.ptx.results import PARTS, SMS, Job, Result

NOT_RUN = "-"


def page(asked: Sequence[Job], found: Iterable[Result]) -> str:
    """The page, with a table for each part: all cases that are asked for, and the results that were found."""
    results = {result.job: result for result in found}
    lines = [HEAD]
    if len(results) < len(asked):
        lines.append(f"Of {len(asked)} cases, {len(results)} ran; `{NOT_RUN}` stands for the others.")
    for number, part in enumerate(PARTS):
        rows: dict[tuple[str, str], dict[int, str]] = {}
        for job in asked:
            if job.part == number:
                told = cell(results[job]) if job in results else NOT_RUN
                rows.setdefault((job.case, job.dtype), {})[job.sm] = told
        lines += [f"## {part.title}", ABOUT[part.title], table(rows)]
    kernels = sorted({kernel for result in results.values() for kernel in result.kernels})
    lines += ["## Kernels", KERNELS, "\n".join(f"- `{kernel}`" for kernel in kernels)]
    return "\n\n".join(lines) + "\n"


def table(rows: dict[tuple[str, str], dict[int, str]]) -> str:
    """Cases by architectures."""
    head = ["case", "type", *(f"sm_{sm}" for sm in SMS)]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * len(SMS)}"]
    for (name, dtype), row in sorted(rows.items()):
        cells = [row.get(sm, "") for sm in SMS]
        lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(result: Result) -> str:
    """What a result is in a table."""
    if result.wrong:
        return f"**{result.wrong}**"
    if result.rms is not None:
        return f"{result.rms:.1e} RMS"
    told = [f"{result.ulp:.2g} ulp"] if result.ulp else []
    told += [f"{result.steps:.1e} of the steps"] if result.steps else []
    return ", ".join(told) or "exact"


HEAD = """# What the compiled kernels compute

Every kernel is compiled for each architecture, and the PTX that its cubin is assembled from is executed on a CPU, by
way of the launcher and a stand-in for the CUDA driver ([tools/ptx](../tools/ptx/README.md)). The results are compared
with the definitions of the ops, the plain PyTorch of `plugins/*/reference.py`. `make ptx` writes this page.

Nothing here ran on a GPU. In what order hardware adds the products of a tensor core is not documented, and what the
assembler makes of PTX is not executed.

In every run each access lay within a tensor, was aligned and read what had been written; no two threads or blocks
raced; no asynchronous copy or product was used before its wait; no 32-bit number wrapped that became an address; and
no infinity came from finite numbers. Parameters, grids, threads, shared memory and streams were those that the
kernels expect.

## How to read the tables

`exact` means that every element is the definition's, to the bit. Errors are in units in the last place (ulp) of the
result's type, so at most half a unit would be unavoidable if the definition did not round either; but it does, in the
same type. Elements that are smaller than the root mean square of their tensor are measured in units of that, because
a sum has the error of its terms. A cell has the largest error of any element. "Of the steps" is the share of 8-bit
integers that are one step away; none is two away.

Where errors are not zero, this is why:

- **Linears by tiles, up to 1 ulp.** The kernel joins the product with a tile's scales and the sum over tiles into one
  rounding, the definition rounds twice. That moves the float32 sum by its last bit, which decides the rounding to 16
  bits for a few of 100,000 elements. By rows there is only one sum, in integers, so these are exact.
- **Linears in 4 bits.** With the scale of its block a number has six bits at most, so that most sums are exact in
  float32 in any order. Those that are not may round to the other side, up to 1 ulp.
- **Linears with GELU.** The hyperbolic tangent is made of `ex2.approx` and a division; its last bit decides a step
  for a few elements of a million.
- **Norms and scores, up to 1 ulp,** because sums are added in another order. Where a norm is modulated, the norm itself
  is rounded first. If it falls to the other side, modulation makes more of the unit than one: up to 2 ulp.
- **RMS norm with rotation, up to 4 ulp.** A norm rounds to the other side, as above, which is one unit of the norm.
  Where the other channel of its pair cancels most of it, the result is smaller and its unit too. With 130 rows of 5,120
  on sm_89, all 14 of 1,331,200 elements that differed were of this kind: their norms lay within 2e-7 of a tie.
- **Attention.** The kernel adds the linear branch to the sparse one in float32 and rounds once. The definition rounds
  both branches, the product of the linear one, its quotient and the projection: up to 4 ulp. With fp8, a value or a
  probability may be the neighbouring code, an eighth of it away: up to 7 ulp in bfloat16, and 8 times as many in
  float16, whose unit is smaller. The nine elements above 3 ulp of 256 tokens in float16 on sm_89 (with the nearest
  results) lie in the two channels in which codes of values differ.
- **Keys and values.** The definition of fp8 values multiplies by a rounded factor, as upstream does, and the kernel
  by a factor of its own that is rounded otherwise: one or two values in 10,000 are the neighbouring code. Means and
  sums of the linear branch are rounded once in either, after float32 and float64 sums.
- **A block.** Errors are the root mean square of the difference, relative to that of the result, and the limit is
  that of `wanforge parity` for a block in bfloat16 (`configs/parity.toml`). A value that falls to the other side of a
  step moves everything after it, and a key block more or less moves a whole query block; so with W8A8 it is some
  percent, and without (`bf16-sla`) less than one.
"""

ABOUT = {
    "Small sizes with ragged blocks": """\
In these, some blocks of every kernel are full and some are not. A cell has the worst of several runs: with approximate
instructions (`ex2`, `rsqrt`, `div.full`) at the nearest result and at both ends of their documented error and, on sm_89
and sm_90, with the few bits that tensor cores keep of sums of fp8, and likewise of those of 4-bit floats on sm_120.""",
    "Real widths, chunks and lanes": """\
These are the sizes of the 14B at 720p (5,120 channels, 13,824 in the feed-forward, 40 heads, 1,182 key blocks in 64
chunks, of which 118 are selected with 2,048 lanes) and of the 1.3B at 480p (1,536 and 8,960 channels, 12 heads, 512 key
blocks in 32 chunks, 51 of them selected with 512 lanes), over as few rows as the kernels allow. Where it says so, the
attention of some query blocks is computed, over all keys. Approximate instructions give the nearest number. They ran on
an architecture of each kind: `mma.sync` with fp16, `wgmma` with fp8, and `mma.sync` with fp8.""",
    "A whole block": """\
A layer of TinyWan with its trained weights, on random inputs, by each recipe that has kernels. With `bf16-sla` PyTorch
computes the linears.""",
}
"""What the page says of each part."""

KERNELS = "These kernels ran, which are all that there are:"
