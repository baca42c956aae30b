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
from saetrack.lm.corpus import Corpus, DatasetCorpus, StdlibCorpus, TextCorpus
from saetrack.lm.forward import (
    EditableLLM,
    activation_widths,
    edit_activations,
    next_token_losses,
    read_activations,
    resolve_hookpoint,
)
from saetrack.lm.tokens import TokenizedCorpus, TokenRows, tokenize_corpus
from saetrack.lm.unembedding import read_unembedding

__all__ = [
    "AuditRow",
    "CheckpointSource",
    "Corpus",
    "DatasetCorpus",
    "EditableLLM",
    "FolderSource",
    "HubSource",
    "LLMCheckpoint",
    "ListSource",
    "PretrainSource",
    "RepositoriesSource",
    "StdlibCorpus",
    "TextCorpus",
    "TokenRows",
    "TokenizedCorpus",
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
