"""The models that jobs may start from: by the name they are served under, or by their source.

    models/tiny, tiny            what this machine serves under that name, or the inference service made under it
    smollm2-135m-instruct        an entry of the catalogue
    org/name                     a hub id
    /folder                      below one of the configured folders

Resolving may download for minutes; blocking, run it in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slipstream_server.errors import InvalidField, ModelNotFound, PermissionDenied, UnsupportedField
from slipstream_server.models.catalogue import builtin_catalogue
from slipstream_server.models.facts import Family, ModelFacts, read_facts
from slipstream_server.models.folder import PROVENANCE, fingerprint, is_plain_name
from slipstream_server.models.hub import parse_hub_id
from slipstream_server.models.sources import SourceOptions, resolve
from slipstream_server.training.model_tokenizer import ModelTokenizer

_SERVED = "models/"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A model in a folder of this machine. ``name`` is portable; ``revision`` is empty where its source has none.
    ``served_as``: "models/{model}" where it was asked for by the name it is served under, which means the same.

    ``has_commits``: a later request may ask for that revision by its name.
    """

    name: str
    served_as: str
    revision: str
    has_commits: bool
    digest: str
    folder: Path
    facts: ModelFacts

    def tokenizer(self) -> ModelTokenizer:
        return ModelTokenizer.load(self.folder, self.facts)


class BaseModels:
    """Resolves names. ``served`` are the operator's own models by name, ``roots`` where clients may name folders, and
    ``made`` has the models that the inference service of this machine made, each in a folder of its name.
    """

    def __init__(self, served: Mapping[str, str], roots: tuple[Path, ...], made: Path | None = None) -> None:
        self._served = dict(served)
        self._roots = roots
        self._made = made

    def resolve(self, spec: str, revision: str = "", *, field: str = "spec.base_model") -> BaseModel:
        """Raises ModelNotFound, InvalidField, and whatever fetching raises."""
        name, source, is_ours = self._source(spec, field)
        has_commits = not is_ours and not Path(source).is_absolute() and parse_hub_id(source) is not None
        if revision:
            if not has_commits:
                raise InvalidField.of(f"{field}_revision", "only models of a hub have revisions")
            source = f"{source.partition('@')[0]}@{revision}"
        options = SourceOptions(allowed_roots=None if is_ours else self._roots)
        try:
            prepared = resolve(source, options=options)
        except InvalidField as error:
            raise InvalidField.of(field, error.violations[0].description) from error
        except (PermissionDenied, ModelNotFound) as error:
            raise type(error)(f"{field}: {error.message.removeprefix('source: ')}") from error
        if prepared.adapter_folder is not None:
            raise UnsupportedField.of(field, "is an adapter, not a model; training goes on from base models only")
        facts = read_facts(prepared.folder)
        is_fetched = prepared.source.startswith(("hub ", "pypi "))
        return BaseModel(
            name=name,
            served_as=f"{_SERVED}{spec.removeprefix(_SERVED)}" if is_ours else "",
            revision=prepared.revision if is_fetched else "",
            has_commits=has_commits,
            digest=fingerprint(prepared.folder),
            folder=prepared.folder,
            facts=facts,
        )

    def _source(self, spec: str, field: str) -> tuple[str, str, bool]:
        """Portable name, source, and whether the operator chose it."""
        if not spec:
            raise InvalidField.of(field, "is required")
        served_name = spec.removeprefix(_SERVED)
        if (source := self._served.get(served_name)) is not None:
            is_known_by_source = source in builtin_catalogue() or (
                parse_hub_id(source) is not None and not Path(source).exists()
            )
            name = source.partition("@")[0] if is_known_by_source else f"{_SERVED}{served_name}"
            return name, source, True
        if (folder := self._made_folder(served_name)) is not None:
            return f"{_SERVED}{served_name}", str(folder), True
        if spec.startswith(_SERVED):
            raise ModelNotFound(f"{field}: no model {served_name[:80]!a} is served on this machine")
        # A folder's place is nobody else's business; its name will do.
        return (Path(spec).name if spec.startswith("/") else spec.partition("@")[0]), spec, False

    def _made_folder(self, name: str) -> Path | None:
        """The folder of a made model; one that is still being made has another name."""
        if self._made is None or not is_plain_name(name):
            return None
        folder = self._made / name
        return folder if (folder / PROVENANCE).is_file() and not folder.is_symlink() else None


def require_causal(base: BaseModel, field: str = "spec.base_model") -> None:
    """Raises UnsupportedField for a model that the runner cannot train."""
    if base.facts.family is not Family.DECODER or not base.facts.is_generative:
        raise UnsupportedField.of(field, f"is a {base.facts.family} model; this build trains causal language models")
    if base.facts.is_quantized:
        raise UnsupportedField.of(field, "is quantized; this build trains LoRA over full-precision models")
