"""The contract, as generated from what the memory declares.

Segments are of 7 tokens or more, so that the kit's slopes along 6 tokens meet no stored key: no gradient flows to
those, which `test_knn_memory.py` tests.
"""

import atexit
import shutil
import tempfile

from altx.testing import conformance

STORE = tempfile.mkdtemp()
atexit.register(shutil.rmtree, STORE, ignore_errors=True)

test_knn = conformance("knn")
test_knn_short = conformance("knn", config={"segment": 7, "k": 3})
test_knn_limited = conformance("knn", config={"segment": 7, "k": 3, "size": 9, "after": 3, "gate": True})
test_knn_that_is_never_full = conformance("knn", config={"segment": 8, "k": 200, "size": 2000, "full": "error"})
test_knn_graph = conformance("knn", config={"segment": 7, "k": 3, "search": "hnsw", "block": 7})
test_knn_graph_limited = conformance(
    "knn", config={"segment": 7, "k": 3, "search": "hnsw", "block": 14, "size": 20, "after": 4}
)
test_knn_disk = conformance("knn", config={"segment": 7, "k": 3, "block": 7, "path": STORE})
test_knn_disk_graph = conformance(
    "knn", config={"segment": 7, "k": 3, "block": 14, "path": STORE, "size": 10, "search": "hnsw", "after": 2}
)
