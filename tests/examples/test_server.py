"""The server as its clients meet it: a process of its own, real sockets, many at once."""

import json
import math
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.server_load import Server, Task, is_right, load, post_file, running_server
from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.serving.classifier import Classifier
from tests.examples.clients import FORM, JSON, count, encoded, form, get, picture, send

GOOD = picture(0)


def test_200_concurrent_requests_lose_none_and_get_none_wrong(
    server: Server, classifier: Classifier
) -> None:
    pictures = [picture(seed) for seed in range(200)]
    task = Task.from_photos(pictures, classifier)
    nearest = min(
        np.abs(one.probabilities - other.probabilities).max()
        for number, one in enumerate(task.expected)
        for other in task.expected[:number]
    )
    assert nearest > 3 * task.most, "two with one answer would hide a mix-up"
    row = load(server, task, clients=200, each=1)
    assert (row["requests"], row["lost"], row["wrong"]) == (200, 0, 0)


def test_a_wrong_answer_is_noticed(classifier: Classifier) -> None:
    one, other = classifier(picture(0)), classifier(picture(1))
    top = [{"label": label, "probability": share} for label, share in other.top(4)]
    answer = {"predictions": [{"label": other.label, "top": top}]}
    assert is_right(200, answer, other, 1e-5)
    assert not is_right(200, answer, one, 1e-5)
    assert not is_right(503, answer, other, 1e-5)
    top[-1]["probability"] += 2e-5
    assert not is_right(200, answer, other, 1e-5)


def test_json_and_forms_hold_one_image_or_several_in_order(
    server: Server, classifier: Classifier
) -> None:
    pictures = [picture(seed) for seed in range(4)]
    labels = [classifier(one).label for one in pictures]
    assert len({*labels}) > 1
    many = json.dumps({"images": [encoded(one) for one in pictures]})
    for body, kind in ((form(*pictures), FORM), (many, JSON)):
        status, answer, _ = send(server, body, kind, "/predict?top_k=2")
        assert status == 200
        assert [one["label"] for one in answer["predictions"]] == labels
        for one, image in zip(answer["predictions"], pictures, strict=True):
            top = [(part["label"], part["probability"]) for part in one["top"]]
            assert top == [
                (label, pytest.approx(p, abs=1e-5)) for label, p in classifier(image).top(2)
            ]
            assert one["confidence"] == top[0][1]
    status, answer, _ = send(server, json.dumps({"image": encoded(pictures[0])}), JSON)
    assert (status, answer["predictions"][0]["label"]) == (200, labels[0])


def test_a_client_that_leaves_in_the_middle_harms_nobody(server: Server) -> None:
    before = count(server, 'capt_requests_total{status="400"}')
    with socket.create_connection((server.host, server.port)) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM}\r\nContent-Length: 999"
        client.sendall(f"{head}\r\n\r\n".encode() + form(GOOD)[:99])
    deadline = time.monotonic() + 10
    while count(server, 'capt_requests_total{status="400"}') == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert post_file(server.connect(), GOOD)[0] == 200


def test_the_metrics_count_what_happened(server: Server, classifier: Classifier) -> None:
    label = classifier(GOOD).label
    names = (
        'capt_requests_total{status="200"}',
        'capt_requests_total{status="422"}',
        "capt_request_seconds_count",
        "capt_batch_size_sum",
        "capt_confidence_count",
        f'capt_predicted_total{{label="{label}"}}',
    )
    before = [count(server, name) for name in names]
    send(server, form(GOOD, GOOD, GOOD), FORM)
    send(server, form(GOOD), FORM)
    send(server, "{}", JSON)
    after = [count(server, name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 1, 3, 4, 4, 4]
    assert (
        'capt_info{backend="onnxruntime",device="cpu",precision="fp32"'
        in get(server, "/metrics")[1]
    )
    assert count(server, "capt_waiting_images") == 0


def test_the_health_says_what_runs(server: Server) -> None:
    status, text = get(server, "/healthz")
    health = json.loads(text)
    assert (status, health["status"], health["backend"]) == (200, "ok", "onnxruntime")
    assert health["classes"] == 4


def test_its_own_description_names_both_kinds_of_body(server: Server) -> None:
    description = json.loads(get(server, "/openapi.json")[1])
    body = description["paths"]["/predict"]["post"]["requestBody"]
    assert {*body["content"]} == {"multipart/form-data", "application/json"}


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    connection = server.connect()
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.status == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "http" not in page
    assert "src=" not in page


def test_what_is_decided_is_answered_and_watched(server_extra: None, decided_bundle: Path) -> None:
    with (
        Classifier.load(decided_bundle, decisions=DecisionOptions(accuracy=0.7)) as own,
        running_server(decided_bundle, "--accuracy", 0.7) as server,
    ):
        assert math.isnan(count(server, "capt_confidence_psi "))
        expected = own(GOOD)
        assert get(server, "/readyz")[0] == 200
        assert math.isnan(count(server, "capt_confidence_psi "))  # which was no photo
        status, answer, _ = send(server, form(GOOD), FORM)
        assert status == 200
        (found,) = answer["predictions"]
        assert found["prediction_set"] == [*expected.prediction_set]
        assert found["rejected"] is expected.rejected
        assert found["familiarity"] == pytest.approx(expected.familiarity)
        for name in ("capt_confidence_psi", "capt_class_psi"):  # of one image
            assert 0 < count(server, f"{name} ") < count(server, f"{name}_by_chance")
        assert math.isnan(count(server, "capt_shift"))  # too few
        assert count(server, "capt_rejection_rate") == expected.rejected
        rate = own.monitor().summary().expected_rejection_rate
        assert count(server, "capt_expected_rejection_rate") == pytest.approx(rate)
