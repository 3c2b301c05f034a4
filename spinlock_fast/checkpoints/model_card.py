"""The model card that a run leaves beside its checkpoint: README.md."""

from __future__ import annotations

from html import escape
from pathlib import Path

from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.remote_files import shown_url
from spinlock_fast.messages import printable
from spinlock_fast.models.metrics import Metrics


def model_card(metrics: Metrics, config: RunConfig) -> str:
    """The model card: description, use, data, quality, limits.

    Sections of Mitchell et al. (2019), filled from the metrics and settings of the run.
    """
    categories = metrics["categories"]
    tokens = sum(len(category["codes"]) for category in categories)
    versions = metrics["versions"]
    return f"""---
library_name: spinlock-fast
tags: [vector-quantization, vq-vae, tokenizer, dynamical-systems]
---

# Behavioural tokenizer

Turns the features of a simulated dynamical system into {tokens} discrete tokens: {len(categories)} categories of
correlated features, each with codebooks from coarse to fine, {metrics["total_codes"]} codes in all. A categorical
hierarchical VQ-VAE with {metrics["parameters"]:,} parameters, made by spinlock-fast {versions["spinlock_fast"]}.

## Use

```python
from spinlock_fast import Tokenizer

tokenizer = Tokenizer.from_checkpoint("this directory")
tokens = tokenizer.encode("data.h5")  # [N, {tokens}], from raw HDF5
features = tokenizer.decode(tokens)  # [N, {metrics["features"]}], named by tokenizer.feature_names
```

```bash
python -m spinlock_fast.tokenize CKPT_DIR data.h5 --output tokens.h5
python -m spinlock_fast.evaluate CKPT_DIR data.h5
python -m spinlock_fast.analyze CKPT_DIR data.h5 --output analysis   # what each token means
```

## Data

{_operators(metrics, config)}
Seed {config.random_seed}. Each family of raw features goes through a network with frozen random weights, or stays as
it is:

| family | encoder | columns standardised first |
|---|---|---|
{_families(config)}

{_settings(metrics)}

## Quality

{_quality(metrics)}{_vocabulary(metrics)}
## Categories

| category | features | families | error | error from one codebook alone | utilization by level | codes by level |
|---|---|---|---|---|---|---|
{_categories(metrics)}
{_outside(metrics)}
Tokens are in this order, level by level: {_token_names(metrics)}.

## Limits

- It is valid for operators similar to its training data. Features far outside their range are clipped and get the
  nearest code, which may be far. `evaluate`, `tokenize` and `analyze` warn about such data; look at `evaluate` first.
- Tokens belong to this checkpoint. Another run, even with another seed only, gives other numbers.
- What a token stands for is not known until it is measured; names such as cluster_1 carry no meaning.
{_unused_codes(metrics)}
{_origin(metrics)}
"""


def _operators(metrics: Metrics, config: RunConfig) -> str:
    if "converted_epoch" in metrics:
        return "The data set of the original run is not named in its checkpoint."
    return (
        f"{metrics['samples']:,} operators of {_data(config)}, of which {metrics['val_rows']:,} were held out for "
        "validation."
    )


def _settings(metrics: Metrics) -> str:
    if "converted_epoch" in metrics:
        return "`config.yaml` holds the settings of the original run that spinlock-fast has as well."
    if "init_from" in metrics:
        return (
            "Encoders, cleaning, categories and normalisation are those of the checkpoint that it started from.\n"
            "`config.yaml` holds every setting; with that checkpoint it trains the same model again."
        )
    return (
        "Cleaning (constant and duplicate columns dropped, outliers clipped), categories and normalisation were "
        "fitted\nto the training rows alone. `config.yaml` holds every setting and trains the same model again."
    )


def _quality(metrics: Metrics) -> str:
    """The measured figures, after a sentence on the rows that they were measured on."""
    if "quality" not in metrics:
        return "Not measured. `python -m spinlock_fast.evaluate CKPT_DIR data.h5` measures it on a file.\n"
    if "converted_epoch" in metrics:
        rows = f"On all {metrics['val_rows']:,} operators of the training file:"
    else:
        rows = (
            f"On the {metrics['val_rows']:,} held-out operators, at epoch {metrics['best_epoch']} of "
            f"{metrics['epochs']}, which was\nchosen by their loss:"
        )
    return f"""{rows}

| metric | value | means |
|---|---|---|
| quality | {metrics["quality"]:.4f} | 1 - reconstruction error, 0 at least |
| reconstruction error | {metrics["reconstruction_error"]:.4f} | mean squared error; 1: always the mean |
| utilization | {metrics["utilization"]:.3f} | share of codes in use, mean over codebooks |
| perplexity / K | {metrics["perplexity_over_k"]:.3f} | 1 where all codes are used equally |
| codes in use | {metrics["active_codes"]} of {metrics["total_codes"]} | |
| distance preservation | {metrics["topo_pre"]:.3f}, {metrics["topo_post"]:.3f} | correlation of distances \
between operators: features with latents, latents with codes |
| category correlation | {metrics["category_correlation_max"]:.3f} | largest mean absolute one of two \
categories' features |
"""


def _vocabulary(metrics: Metrics) -> str:
    """A section on what changed in the vocabulary of the checkpoint that the run started from; empty without one."""
    if "init_from" not in metrics:
        return ""
    change = metrics["init_from"]
    start, codes, data = change["init_from"], change["codes"], [change["new_data"], change["old_data"]]
    lines = zip(_CHANGES, *map(_changes, data), strict=True)
    table = "\n".join(f"| {name} | {new} | {old} |" for name, new, old in lines)
    missing = "\nThe data of that checkpoint could not be read again.\n" if "missing" in data[1] else ""
    return f"""
## Vocabulary

The model of `{_code(Path(start["name"]).name)}` (SHA-256 {start["sha256"][:12] or "not known"}) was trained further, \
with its codebooks (frozen: {start["freeze"]}).
Of its {codes["in_use"]} codes in use, {codes["in_use_kept"]} kept their place; the others were replaced. The median \
shift is {codes["median_shift"]:.2f} of
the distance between neighbouring codes. By codebook: `vocabulary.json`.

| | new data | data of that checkpoint |
|---|---|---|
{table}
{missing}"""


_CHANGES = (
    "rows compared",
    "equal tokens",
    "adjusted mutual information of old and new tokens",
    "codes in use, before and after",
    "codes that died, and newly used ones",
    "reconstruction error, before and after",
)


def _changes(data: Metrics) -> list[str]:
    """The texts of `_CHANGES` for the rows of one data set."""
    if "missing" in data:
        return [""] * len(_CHANGES)
    information = data["adjusted_mutual_information"]
    return [
        f"{data['rows']:,}",
        f"{data['equal_tokens']:.1%}",
        "" if information is None else f"{information:.2f}",
        f"{data['in_use_before']}, {data['in_use_after']}",
        f"{data['died']}, {data['newly_used']}",
        f"{data['error_before']:.4f}, {data['error_after']:.4f}",
    ]


def _unused_codes(metrics: Metrics) -> str:
    if "active_codes" not in metrics:
        return ""
    rows = "operator of the training file" if "converted_epoch" in metrics else "held-out operator"
    unused = metrics["total_codes"] - metrics["active_codes"]
    return f"- A code that few operators have is little tested: {unused} of the codes were\n  used by no {rows}.\n"


def _origin(metrics: Metrics) -> str:
    if "converted_epoch" in metrics:
        epoch = metrics["converted_epoch"]
        return f"Converted from epoch {epoch} of a run of the original project. All figures: `metrics.json`."
    seconds = f"{metrics['seconds']['total']:.0f} s"
    return (
        f"Trained on {metrics['device']} in {seconds} with torch {metrics['versions']['torch']}. All figures:\n"
        "`metrics.json`; by epoch: `training_history.json`."
    )


def _data(config: RunConfig) -> str:
    paths = config.dataset_path
    if paths is None:
        return "a matrix given in Python"
    names = [f"`{_code(Path(shown_url(path)).name)}`" for path in ([paths] if isinstance(paths, str) else paths)]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more files" if len(names) > 4 else "")


def _families(config: RunConfig) -> str:
    return "\n".join(
        f"| {_text(name)} | {family.encoder} | {'yes' if family.standardize else 'no'} |"
        for name, family in config.families.items()
    )


def _categories(metrics: Metrics) -> str:
    return "\n".join(
        f"| {_text(c['name'])} | {c['features']} | "
        f"{', '.join(f'{_text(name)} {n}' for name, n in c.get('families', {}).items())} | "
        f"{_error(c, 'mse')} | {_error(c, 'partial_mse')} | "
        f"{' / '.join(f'{u:.2f}' for u in c.get('utilization', []))} | "
        f"{' / '.join(str(k) for k in c['codes'])} |"
        for c in metrics["categories"]
    )


def _error(category: Metrics, name: str) -> str:
    return f"{category[name]:.4f}" if name in category else ""


def _outside(metrics: Metrics) -> str:
    """A paragraph on features in no category; empty where there are none."""
    categories = metrics["categories"]
    count = metrics["features"] - sum(category["features"] for category in categories)
    if not count:
        return ""
    readers = [f"{_text(c['name'])} reads {len(c['also_reads'])}" for c in categories if c["also_reads"]]
    read = f" ({', '.join(readers)} of them as well)" if readers else ""
    return f"\n{count} more of the features are in no category{read}: they are reconstructed from all codes.\n"


def _token_names(metrics: Metrics) -> str:
    names = [f"{_text(c['name'])}/L{level}" for c in metrics["categories"] for level in range(len(c["codes"]))]
    return ", ".join(names if len(names) <= 6 else [*names[:4], "...", names[-1]])


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*[]|~#$"})


def _code(name: str) -> str:
    """A name between backticks, where Markdown interprets nothing but a backtick."""
    return printable(name).replace("`", "'")


def _text(name: str, most: int = 80) -> str:
    """A name from the data or the settings, so that no character of it is markup."""
    name = printable(name)
    name = name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 :]}"
    return escape(name.translate(_MARKDOWN))
