"""Generated inputs of a start: encoded records whose texts do not exist, and a store with their log-probs."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.setting import SHAPES, Setting, save_random_model, train_tokenizer, write_synthetic
from dpo_dist.batching.content_keys import response_key

KINDS = ("pairs", "labelled")
LOGP = -math.log(SHAPES["tiny"].vocabulary)
"""The log-prob of each token by the model of `write_model`."""

# Short texts: a prompt and a response have about 8 tokens each.
_TEXTS = Setting("tiny", 0, 1, mean_tokens=6, shared_prefix=0.5, length_spread=0.4)
_TEMPLATES = 64
_CHUNK = 100_000


def overrides(folder: Path, model: Path, kind: str) -> list[str]:
    """Return the overrides of a run with the data and the store of `folder`."""
    return [
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train=[{folder}/train.jsonl]",
        f"data.eval=[{folder}/eval.jsonl]",
        f"data.cache={folder}/encoded",
        "data.max_length=64",
        f"reference.store={folder}/store",
        "parallelism=ddp",
        "trainer.global_batch_pairs=16",
        "trainer.eval_every=0",
        "optim.warmup=0",
        "tracking=off",
        "sampling.prompts=0",
        *(["loss=kto"] if kind == "labelled" else []),
    ]


def write_model(folder: Path) -> None:
    """Write a random model whose head is zero, so that all tokens are equally likely, and a tokenizer."""
    from safetensors.numpy import load_file, save_file

    texts = folder.with_name("texts.jsonl")
    write_synthetic(texts, _TEXTS)
    shape = dataclasses.replace(SHAPES["tiny"], tied=False)
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_random_model(shape, folder, 0, **tokens)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = np.zeros_like(weights["lm_head.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def prepare(folder: Path, model: Path, kind: str, records: int, filled: Path | None = None) -> None:
    """Write the inputs of a start with this number of records into the new folder `folder`.

    The files of texts are short; the encoded training file has the name that belongs to them, but generated
    records. `filled`: a store with the log-probs of the evaluation data, to which those of all generated
    records are added; None: there is no store yet.
    """
    from dpo_dist.config.load import load_run_config
    from dpo_dist.data import Part
    from dpo_dist.encoded.build import Preparation
    from dpo_dist.encoded.dataset import open_dataset
    from dpo_dist.encoded.partners import with_partners
    from dpo_dist.encoded.store import IMAGE_SCHEMA, ensure_order, write_source
    from dpo_dist.model.files.load import load_tokenizer, tokenizer_digest
    from dpo_dist.reference.fill import ENTRIES_PER_SHARD
    from dpo_dist.reference.store import FINGERPRINT_FILE, LogpStore, read_fingerprints

    folder.mkdir()
    for seed, name in enumerate(("train", "eval")):
        _write_texts(folder / f"{name}.jsonl", kind, seed)
    config = load_run_config(overrides(folder, model, kind))
    data, tokenizer, digest = config.data, load_tokenizer(model, config.model), tokenizer_digest(model)
    evaluated = Preparation(data.eval, data, tokenizer, digest, part=Part.to_evaluate(data)).whole()
    part = Part.to_train(data, open_dataset(evaluated, data).prompt_hashes[:])
    short = dataclasses.replace(data, cache=str(folder / "short"))
    [source] = Preparation(data.train, short, tokenizer, digest, part=part).whole()
    table = source.table()
    assert table is not None, "it was written just now"
    names = pa.array([source.path] * len(table))
    [templates] = table.set_column(0, table.schema.field("file"), names).combine_chunks().to_batches()
    generated = dataclasses.replace(source, cache=Path(data.cache))
    no_images = pa.RecordBatch.from_pylist([], IMAGE_SCHEMA)
    write_source(generated, ((batch, no_images) for batch in _batches(templates, records)))
    ensure_order(generated, None)
    shutil.rmtree(folder / "short")
    if filled is None:
        return
    dataset = open_dataset([generated], data)
    if config.loss.needs_partners:
        dataset = with_partners(dataset, data.max_length)
    shutil.copytree(filled, folder / "store")
    [fingerprint] = read_fingerprints(folder / "store")
    store = LogpStore.open(folder / "store", fingerprint, [])
    is_response = np.ones(len(dataset.piece_tokens), dtype=np.bool_)
    is_response[dataset.first_pieces[:-1]] = False
    tokens = dataset.piece_tokens[is_response]
    values = np.full(int(tokens.max()), LOGP, dtype=np.float32)
    for start in range(0, len(tokens), ENTRIES_PER_SHARD):
        within = slice(start, start + ENTRIES_PER_SHARD)
        store.write(dataset.keys[within], [values[:number] for number in tokens[within]])
    encoded = {file for each in (generated, *evaluated) for file in (each.file, each.order_file)}
    shards = {*(folder / "store").glob("*/*.safetensors"), *(folder / "store").glob(f"*/{FINGERPRINT_FILE}")}
    remove_others(folder, encoded | shards)


def built_files(folder: Path) -> set[Path]:
    """Return the files of encoded data and store, which starts add to."""
    return {file for name in ("encoded", "store") for file in (folder / name).rglob("*") if file.is_file()}


def remove_others(folder: Path, kept: set[Path]) -> None:
    """Remove the files of encoded data and store but these."""
    for file in built_files(folder) - kept:
        file.unlink()


def _write_texts(file: Path, kind: str, seed: int) -> None:
    """Write a few pairs of random words; or labelled responses, half of them good."""
    write_synthetic(file, dataclasses.replace(_TEXTS, seed=seed), _TEMPLATES)
    if kind == "labelled":
        pairs = enumerate(map(json.loads, file.read_text().splitlines()))
        labelled = [
            {"prompt": each["prompt"], "completion": each["chosen"], "label": number % 2 == 0}
            for number, each in pairs
        ]
        file.write_text("".join(f"{json.dumps(each)}\n" for each in labelled))


def _batches(templates: pa.RecordBatch, records: int) -> Iterator[pa.RecordBatch]:
    """Yield rows like the templates, in random order, with random token ids and the keys of these."""
    draw = np.random.default_rng(0)
    for start in range(0, records, _CHUNK):
        rows = min(_CHUNK, records - start)
        batch = templates.take(pa.array(draw.integers(0, len(templates), rows)))
        tokens = batch["piece_tokens"].flatten().to_numpy().reshape(rows, -1)
        stops = np.cumsum(tokens, dtype=np.int64).reshape(tokens.shape)
        starts = stops - tokens
        ids = draw.integers(0, SHAPES["tiny"].vocabulary, stops[-1, -1], dtype=np.int32)
        # Responses of a record begin with different tokens.
        ids[starts[:, 1:]] = ids[starts[:, 1:]] & ~3 | np.arange(tokens.shape[1] - 1, dtype=np.int32)
        columns = {
            "line": pa.array(np.arange(start + 1, start + rows + 1)),
            "prompt": pa.array(draw.integers(0, 2**64, rows, dtype=np.uint64)),
            "largest_id": pa.array(np.full(rows, ids.max())),
            "ids": _like(batch["ids"], ids),
            "keys": _like(batch["keys"], _keys(ids, starts, stops)),
            "begins": _like(batch["begins"], np.zeros(starts[:, 1:].size, dtype=np.int32)),
        }
        yield pa.RecordBatch.from_arrays(
            [columns.get(name, batch[name]) for name in batch.schema.names], schema=batch.schema
        )


def _like(lists: pa.ListArray, values: np.ndarray) -> pa.ListArray:
    """Return lists of the same lengths with other values."""
    return pa.ListArray.from_arrays(lists.offsets, pa.array(values))


def _keys(ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the words of the responses' keys; `starts` and `stops` of pieces: int64 [rows, pieces]."""
    keys = (
        response_key(ids[bounds[0][0] : bounds[0][1]], ids[first:stop])
        for bounds in np.stack((starts, stops), axis=2).tolist()
        for first, stop in bounds[1:]
    )
    return np.frombuffer(b"".join(keys), dtype=np.uint64)
