import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_common import limits, names
from prism_common.errors import InvalidArgumentError


@pytest.mark.parametrize("name", ["a", "0", "a-b", "x" * 63, "cosmic-dragon"])
def test_names_are_rfc_1123_labels(name: str) -> None:
    assert names.validate_name(name, "name") == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "A", "a_b", "a.b", "a b", "x" * 64, "é", "a\n", "\0", "x" * 1_048_576, "../a"],
)
def test_what_is_no_name_is_refused_briefly(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        names.validate_name(name, "name")
    assert caught.value.field == "name"
    assert len(caught.value.message) < 400


def test_generated_names_and_ids_are_valid_and_differ() -> None:
    made = {names.generate_name() for _ in range(200)}
    assert len(made) == 200
    for name in made | {names.generate_name(0)}:
        names.validate_name(name, "name")
    assert len({names.generate_id("sb") for _ in range(200)}) == 200


@given(st.text(max_size=140))
def test_request_ids_are_printable_ascii_and_bounded(text: str) -> None:
    valid = 0 < len(text) <= 128 and all("\x21" <= c <= "\x7e" for c in text)
    if valid:
        assert names.validate_request_id(text) == text
    else:
        with pytest.raises(InvalidArgumentError) as caught:
            names.validate_request_id(text)
        assert caught.value.field == "request_id"


@pytest.mark.parametrize(
    "labels",
    [
        {}, {"a": ""}, {"app": "web"}, {"example.com/app": "v1.2_3-x"},
        {f"k{i}": "v" for i in range(limits.LABELS_MAX)}, {"x" * 63: "y" * 63},
    ],
)  # fmt: skip
def test_labels_are_as_in_kubernetes(labels: dict[str, str]) -> None:
    assert names.validate_labels(labels, "labels") == labels


@pytest.mark.parametrize(
    "labels",
    [
        {"": "v"}, {"-a": "v"}, {"a/": "v"}, {"/a": "v"}, {"UPPER/a": "v"}, {"a": "-"},
        {"a": "v" * 64}, {"x" * 64: "v"}, {"a": "a b"}, {"a\n": "v"}, {"k" * 100_000: "v"},
        {f"k{i}": "v" for i in range(limits.LABELS_MAX + 1)},
    ],
)  # fmt: skip
def test_other_labels_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        names.validate_labels(labels, "spec.labels")
    assert caught.value.field == "spec.labels"
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "env",
    [
        {"": "v"}, {"1A": "v"}, {"A B": "v"}, {"A=": "v"}, {"A": "\0"}, {"A" * 70_000: "\0"},
        {"A": "x" * 65_536}, {f"K{i}": "" for i in range(limits.ENV_ENTRIES_MAX + 1)},
    ],
)  # fmt: skip
def test_environments_are_bounded(env: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        names.validate_env(env, "spec.env")
    assert caught.value.field == "spec.env"
    assert len(caught.value.message) < 400


def test_an_environment_may_fill_its_bound() -> None:
    env = {"A": "é" * ((limits.ENV_BYTES_MAX - 3) // 2)}
    assert names.validate_env(env, "env") == env
