"""The page docs/attacks.md, made from the catalogue: `python -m attacks.page > docs/attacks.md`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields

from attacks.catalogue import Entry, attacks
from attacks.objectives import OBJECTIVES
from attacks.options import OPTIMIZERS, PatchOptions, PixelOptions

_HEAD = """# Attacks

Made from the catalogue by `python -m attacks.page`; a test holds that it is up to date. `ramdefense attacks` prints the
same list, `ramdefense attacks --json` as JSON.

Every attack is a composition of the same parts: an objective, a step rule, transformations, a place and a target, run
by one loop (`attacks.optimize`). A name is a choice of these; everything else is open:

```sh
ramdefense evaluate --model zoo:scenes-nonlocal --data scenes:8 --attack apgd --target strip --max-iter 100
ramdefense evaluate --model zoo:scenes-nonlocal --data scenes:8 --attack "apgd:target=strip,max_iter=100"
ramdefense evaluate --model zoo:scenes-nonlocal --data scenes:8 --attack all --target permute --max-iter 20
```

```python
from attacks import PatchAttack, attack

attack("apgd", segmenter, target="permute").generate(x, y)  # in ART's style
PatchAttack(segmenter, target="permute", optimizer="apgd", eps_step=0.1).generate(x, y)  # the same
```

The same options make the same attack in torchattacks' style, `attacks.torch_style.PatchAttack(model, ...)`. Without a
target an attack leaves the labels that it is given. An option given for several attacks at once (`--max-iter`,
`--option`) goes to those that leave it open; what makes an attack itself, in the column *sets*, stays.
"""


def page() -> str:
    """The page as Markdown."""
    entries = list(attacks().values())
    parts = [
        _HEAD,
        "## Patches\n\nThe pixels of a patch take any value in the clip range; nothing else changes.\n",
        _table(entry for entry in entries if entry.threat == "patch"),
        "\n## Every pixel, a little\n\nEvery pixel moves, within a ball around the image "
        "(`eps`, `norm`) or by as little as is needed.\n",
        _table(entry for entry in entries if entry.threat != "patch"),
        "\n## Parts\n",
        f"Objectives: {_names(OBJECTIVES)}. Step rules: {_names(OPTIMIZERS)}. "
        "Each is documented in `attacks/objectives.py` and `attacks/steps.py`.\n",
        "\nOptions of a patch attack, with their defaults: " + _options(PatchOptions) + ".\n",
        "\nOf a pixel-wise one, beside those that both have: " + _options(PixelOptions, PatchOptions) + ".\n",
    ]
    return "".join(parts)


def _table(entries: Iterable[Entry]) -> str:
    rows = ["\n| attack | what it does | sets | source |", "| --- | --- | --- | --- |"]
    rows += [f"| `{e.name}` | {e.summary} | {_code(e.options)} | {e.paper or 'ours'} |" for e in entries]
    return "\n".join(rows) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _options(of: type, but: type | None = None) -> str:
    known = {f.name: f.default for f in fields(but)} if but else {}
    own = [f for f in fields(of) if known.get(f.name, MISSING) != f.default]
    return ", ".join(f"`{f.name}={f.default!r}`" for f in own)


if __name__ == "__main__":
    import sys

    sys.stdout.write(page())
