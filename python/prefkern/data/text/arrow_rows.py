"""Rows of a dataset for torch's DataLoader, fetched as Arrow."""

from typing import Any

from prefkern import check
from prefkern.data.batches.truncation import METADATA, truncation_of
from prefkern.data.types import Prepared


class ArrowRows:
    """A map-style dataset for ``torch.utils.data.DataLoader`` whose batches are ``pyarrow.Table``s.

    ``dataset``: what `prepare` returns, or a ``datasets.Dataset``, also shuffled or with rows selected. The loader asks
    for all rows of a batch at once and hands the table to ``collate_fn`` as it is: no token becomes a Python object on
    its way from the file into the batch. The collators of ``prefkern.data`` and of
    ``prefkern.integrations.trl.collators`` take such tables.

        rows = pk.data.ArrowRows(pk.data.prepare("pairs.jsonl", tokenizer))
        collate = functools.partial(pk.data.collate_pairs, pad_token_id=tokenizer.pad_token_id)
        for batch in torch.utils.data.DataLoader(rows, batch_size=64, shuffle=True, collate_fn=collate): ...

    One row, ``rows[3]``, is a dict of Python values.
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, Prepared):
            dataset = dataset.dataset
        if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
            check.fail_type("data.ArrowRows", f"dataset must be a datasets.Dataset, got {type(dataset).__name__}")
        self.dataset = dataset.with_format("arrow")
        self._cut = truncation_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index].to_pylist()[0]

    def __getitems__(self, indices: Any) -> Any:
        table = self.dataset[indices]
        if self._cut is None:
            return table
        return table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: self._cut.mark.encode()})
