import importlib

from pipeline.ahead import prepare_ahead

DATASET = """
import os

class Environment:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return os.environ.get("CREDENTIAL_OF_TODAY")
"""


def test_workers_see_the_environment_as_it_is_when_they_start(tmp_path, monkeypatch):
    """They are forked from a server that may have started long before."""
    (tmp_path / "environment_dataset.py").write_text(DATASET)
    monkeypatch.syspath_prepend(tmp_path)
    dataset = importlib.import_module("environment_dataset").Environment()
    assert list(prepare_ahead(dataset, num_workers=1)) == [None]
    monkeypatch.setenv("CREDENTIAL_OF_TODAY", "renewed")
    assert list(prepare_ahead(dataset, num_workers=1)) == ["renewed"]
