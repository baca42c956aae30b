"""The language model's side: its series of checkpoints, its activations at a hookpoint, and its tokens."""

from saetrack.lm.audit import AuditRow, audit, describe_checkpoints, format_audit, problems
from saetrack.lm.checkpoints import (
    CheckpointSource,
    FolderSource,
    HubSource,
    ListSource,
    LLMCheckpoint,
    PretrainSource,
    RepositoriesSource,
    commit_sha,
    load_llm,
    release_memory,
    source_from_string,
    weight_hash,
)
from saetrack.lm.corpus import Corpus, StdlibCorpus, TextCorpus
from saetrack.lm.dataset_corpus import DatasetCorpus
from saetrack.lm.forward import (
    EditableLLM,
    activation_widths,
    edit_activations,
    next_token_losses,
    read_activations,
    resolve_hookpoint,
)
from saetrack.lm.local.lightning import LightningSource
from saetrack.lm.local.nanogpt import NanoGPTSource
from saetrack.lm.local.torchtitan import TorchtitanSource
from saetrack.lm.table_files import JsonLinesCorpus, ParquetCorpus
from saetrack.lm.tables import TableCorpus, TokenColumns
from saetrack.lm.tokens import RowSettings, TokenizedCorpus, TokenRows, tokenize_corpus
from saetrack.lm.unembedding import read_unembedding

__all__ = [
    "AuditRow",
    "CheckpointSource",
    "Corpus",
    "DatasetCorpus",
    "EditableLLM",
    "FolderSource",
    "HubSource",
    "JsonLinesCorpus",
    "LLMCheckpoint",
    "LightningSource",
    "ListSource",
    "NanoGPTSource",
    "ParquetCorpus",
    "PretrainSource",
    "RepositoriesSource",
    "RowSettings",
    "StdlibCorpus",
    "TableCorpus",
    "TextCorpus",
    "TokenColumns",
    "TokenRows",
    "TokenizedCorpus",
    "TorchtitanSource",
    "activation_widths",
    "audit",
    "commit_sha",
    "describe_checkpoints",
    "edit_activations",
    "format_audit",
    "load_llm",
    "next_token_losses",
    "problems",
    "read_activations",
    "read_unembedding",
    "release_memory",
    "resolve_hookpoint",
    "source_from_string",
    "tokenize_corpus",
    "weight_hash",
]
