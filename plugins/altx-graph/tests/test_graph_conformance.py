"""The contract's own checks."""

from __future__ import annotations

from altx.testing import conformance

test_gcn = conformance("gcn")
test_gcn_dilated = conformance("gcn", config={"graph": "dilated", "window": 9})
test_gcn_knn = conformance("gcn", config={"graph": "knn", "window": 6, "neighbours": 3})
test_gat = conformance("gat")
test_gat_knn = conformance("gat", config={"graph": "knn", "window": 6, "neighbours": 3, "share_weights": True})
test_graphsage = conformance("graphsage")
test_gin = conformance("gin", config={"train_eps": True})
test_graph_transformer = conformance("graph-transformer")
test_gps = conformance("gps")
test_gps_block = conformance("gps", config={"block": True, "local": "gat"})
test_gps_batch_norm = conformance("gps", config={"block": True, "norm": "batch"})
test_gcn_supplied = conformance("gcn", config={"graph": "supplied"})
test_gps_supplied = conformance("gps", config={"graph": "supplied", "block": True})
