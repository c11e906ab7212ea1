"""The transport against a real server that misbehaves: what is lost is counted, nothing is paid twice, no budget is passed."""

import gzip
import json
import shutil
import sqlite3
import subprocess
import time
import tracemalloc
from collections import Counter
from multiprocessing.pool import ThreadPool

import pytest
from pydantic import ValidationError

from oprd.errors import ConfigError, DiskError, ServerError
from oprd.teacher import transport
from oprd.teacher.exchange import Request, ServerSection, Tokens
from oprd.teacher.transport import Transport
from processes import room
from serving import Body, FaultyServer

SECRET = "sk-very-secret-0123456789"


def config(server: FaultyServer, **changes) -> ServerSection:
    options = {"base_url": server.url, "model": "teacher", "timeout_s": 60.0, "step_timeout_s": 120.0, "max_retries": 2}
    return ServerSection(**options | changes)


def open_transport(
    server: FaultyServer, folder, *, teacher="", rank=0, world_size=1, run="run", **changes
) -> Transport:
    account = (run, teacher, rank)
    return Transport(config(server, **changes), cache=folder / "cache.sqlite", account=account, world_size=world_size)


def request(text: str, samples: int = 1, max_tokens: int = 6) -> Request:
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 1.0} | ({"n": samples} if samples > 1 else {})
    bound = Tokens(len(text), samples * max_tokens)
    return Request(endpoint="completions", body=body, samples=samples, upper_bound=bound)


REQUESTS = [[request(f"{i}+{j}") for j in range(3)] for i in range(4)]


def counts(transport: Transport) -> dict[str, float]:
    return {metric.name.split("/")[1]: metric.sum for metric in transport.metrics()}


def account(folder) -> tuple[int, int, int]:
    """Requests, prompt tokens and completion tokens."""
    with sqlite3.connect(folder / "cache.sqlite") as database:
        return database.execute("SELECT requests, prompt, completion FROM usage").fetchone()


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


@pytest.fixture
def half_may_be_lost(monkeypatch):
    monkeypatch.setattr(transport, "MAX_LOST_SHARE", 0.5)


def test_equal_requests_of_a_step_are_different_draws_and_the_same_step_again_is_not_paid_again(server, tmp_path):
    asked = open_transport(server, tmp_path)
    chains = [[request("1+2", max_tokens=12)] for _ in range(6)]
    first = asked.send(chains)
    assert len({response.texts[0] for (response,) in first}) > 1
    assert counts(asked) == {
        "requests": 6, "retries": 0, "cache_hits": 0, "lost": 0, "prompt_tokens": 18, "cost": 0.0,
        "completion_tokens": sum(response.used.completion for (response,) in first),
    }  # fmt: skip
    again = open_transport(server, tmp_path)
    assert again.send(chains) == first
    assert counts(again)["cache_hits"] == 6
    assert server.requests == 6


def test_what_was_done_is_counted_until_it_is_read_and_once(server, tmp_path):
    asked = open_transport(server, tmp_path)
    asked.send([[request("1+2")]])
    asked.send([[request("1+2")], [request("3+4")]])
    told = counts(asked)
    assert (told["requests"], told["cache_hits"], told["prompt_tokens"]) == (2, 1, 6)
    assert set(counts(asked).values()) == {0}


def test_what_was_lost_before_is_no_part_of_a_steps_share(server, tmp_path, half_may_be_lost):
    server.fault = lambda number: "400" if number in {1, 2} else None
    asked = open_transport(server, tmp_path, concurrency=1)
    asked.send([[request(f"{i}+2")] for i in range(4)])
    asked.send([[request(f"{i}+3")] for i in range(2)])
    assert counts(asked)["lost"] == 2


def test_another_model_or_length_is_another_request(server, tmp_path):
    open_transport(server, tmp_path).send([[request("1+2")]])
    open_transport(server, tmp_path).send([[request("1+2", max_tokens=5)]])
    open_transport(server, tmp_path, model="other").send([[request("1+2")]])
    assert server.requests == 3


def test_requests_of_a_chain_go_in_order_and_chains_side_by_side_up_to_the_limit(server, tmp_path):
    open_transport(server, tmp_path, concurrency=2).send(REQUESTS)
    order = {json.loads(body)["prompt"]: at for at, body in enumerate(server.generated)}
    asked = [[order[f"{i}+{j}"] for j in range(3)] for i in range(4)]
    assert all(row == sorted(row) for row in asked)
    # two at a time: the last two chains begin after one of the first two has ended
    assert min(asked[2][0], asked[3][0]) > min(asked[0][2], asked[1][2])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "cut", "not json", "wrong json", "empty", "fewer", "longer", "429"])
def test_a_fault_that_passes_costs_a_retry_and_no_answer(fault, server, tmp_path):
    server.fault = lambda number: fault if number % 3 == 0 else None
    asked = open_transport(server, tmp_path, max_retries=6)
    chains = [[request(f"{i}+{j}", samples=2) for j in range(2)] for i in range(4)]
    responses = asked.send(chains)
    assert all(response is not None and len(response.texts) == 2 for chain in responses for response in chain)
    told = counts(asked)
    assert told["retries"] == server.requests - 8 > 0
    assert told["requests"] == server.requests
    calm = FaultyServer()
    with calm:
        assert open_transport(calm, tmp_path / "calm").send(chains) == responses  # the faults changed no response


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "cut", "not json", "empty", "fewer", "longer"])
def test_a_fault_that_stays_loses_that_request_alone(fault, server, tmp_path, half_may_be_lost):
    asked = open_transport(server, tmp_path, max_retries=1, concurrency=1)
    server.fault = lambda number: fault if number in {1, 2} else None
    responses = asked.send([[request("1+2", samples=2)], [request("3+4", samples=2)]])
    assert [row[0] is None for row in responses] == [True, False]
    assert counts(asked)["lost"] == 1


@pytest.mark.slow
def test_a_request_that_hangs_is_given_up_at_its_limit_and_the_rest_goes_on(server, tmp_path, half_may_be_lost):
    server.fault = lambda number: "hang" if number == 2 else None
    open_transport(server, tmp_path).send([[request("5+6")]])  # the first generation is slow
    asked = open_transport(server, tmp_path, timeout_s=5.0, max_retries=0, concurrency=1)
    responses = asked.send([[request("1+2")], [request("3+4")]])
    assert responses[0] == [None]
    assert responses[1][0] is not None
    assert account(tmp_path)[:2] == (3, 9)


@pytest.mark.slow
def test_a_step_ends_at_its_limit_whatever_hangs(server, tmp_path):
    server.fault = lambda number: "hang" if number > 3 else None
    asked = open_transport(server, tmp_path, step_timeout_s=5.0)
    asked.send([[request("5+6")]])  # the first generation is slow
    with pytest.raises(ServerError, match=r"2 of 4 responses .* \(2 x no response within step_timeout_s=5\)"):
        asked.send([[request(f"{i}+1")] for i in range(4)])
    assert account(tmp_path)[:2] == (5, 15)  # what hung may have cost


def test_too_many_lost_responses_stop_the_run_saying_why(server, tmp_path):
    server.fault = lambda number: "500"
    why = r"4 of 4 responses of this step were lost \(4 x HTTP 500: .*oops.*allowed is a share of 0.1. Look at the server's log"
    with pytest.raises(ServerError, match=why):
        open_transport(server, tmp_path, max_retries=1).send([[request(f"{i}+1")] for i in range(4)])


@pytest.mark.parametrize("fault", ["400", "413", "422"])
def test_a_request_that_the_server_refuses_is_lost_alone_and_not_sent_again(fault, server, tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "MAX_LOST_SHARE", 0.5)
    server.fault = lambda number: fault if number == 2 else None
    asked = open_transport(server, tmp_path, concurrency=1)
    responses = asked.send([[request("1+2"), request("3+4"), request("5+6")]])
    assert [response is None for response in responses[0]] == [False, True, False]
    told = counts(asked)
    assert (told["lost"], told["retries"]) == (1, 0)
    server.fault = lambda number: fault
    monkeypatch.undo()
    with pytest.raises(ServerError, match=rf"1 of 3 .*1 x HTTP {fault}: .*too long for me.*allowed is a share of 0.1"):
        open_transport(server, tmp_path).send([[request("1+2"), request("3+4"), request("5+6")]])


def test_a_model_that_the_server_does_not_know_stops_the_run_at_the_first_request(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "MAX_LOST_SHARE", 0.9)
    server.fault = lambda number: "404"
    with pytest.raises(ServerError, match=r"HTTP 404.*The server refuses what this recipe asks for"):
        open_transport(server, tmp_path, concurrency=1).send(REQUESTS)
    assert server.requests == 1


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("stop", True), ("eos_token", True), ("end_turn", True), ("length", False), ("model_length", False)],
)
def test_a_text_is_finished_only_if_the_model_ended_it(reason, finished, server, tmp_path):
    server.fault = lambda number: f"ends: {json.dumps(reason)}"
    ((response,),) = open_transport(server, tmp_path).send([[request("1+2", samples=2)]])
    assert response.finished == (finished, finished)


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "abort"])
def test_a_response_that_was_withheld_or_broken_off_is_lost_and_not_requested_again(
    reason, server, tmp_path, half_may_be_lost
):
    server.fault = lambda number: f"ends: {json.dumps(reason)}" if number == 1 else None
    asked = open_transport(server, tmp_path, concurrency=1)
    responses = asked.send([[request("1+2"), request("3+4")]])
    assert [response is None for response in responses[0]] == [True, False]
    assert server.requests == 2
    server.fault = lambda number: f"ends: {json.dumps(reason)}"
    with pytest.raises(ServerError, match=rf"finish_reason '{reason}'"):
        open_transport(server, tmp_path).send([[request("5+6")]])


def test_without_a_reason_only_a_lone_text_shorter_than_asked_for_is_taken_as_finished(server, tmp_path):
    server.fault = lambda number: "ends: null"
    asked = open_transport(server, tmp_path)

    def finished(samples: int, max_tokens: int) -> list[bool]:
        messages = [{"role": "user", "content": "12+34-5"}]
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 1.0, "n": samples}
        chat = Request(
            endpoint="chat/completions", body=body, samples=samples, upper_bound=Tokens(100, samples * max_tokens)
        )
        ((response,),) = asked.send([[chat]])
        return list(response.finished)

    assert finished(1, 200) == [True]
    assert finished(1, 2) == [False]
    assert finished(2, 200) == [False, False]


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_pause_is_as_long_as_the_server_asks(fault, server, tmp_path):
    server.fault = lambda number: fault if number == 1 else None
    server.retry_after = "1.2"
    open_transport(server, tmp_path, concurrency=1).send([[request("1+2")]])
    assert server.times[1] - server.times[0] >= 1.2


def test_a_pause_that_is_too_long_is_not_slept_through(server, tmp_path):
    server.fault = lambda number: "429"
    server.retry_after = "3600"
    with pytest.raises(
        ServerError, match=r"too many requests.*Retry-After: 3600.*Lower concurrency or wait, then resume"
    ):
        open_transport(server, tmp_path, concurrency=1).send([[request("1+2")]])
    assert server.requests == 1
    server.fault = lambda number: "503"
    with pytest.raises(ServerError, match=r"1 of 1 .*HTTP 503"):
        open_transport(server, tmp_path, concurrency=1).send([[request("1+2")]])
    assert server.requests == 2


def test_a_storm_of_429_stops_the_run_with_advice_and_what_was_answered_is_kept(server, tmp_path):
    server.fault = lambda number: "429" if number > 3 else None
    with pytest.raises(ServerError, match=r"too many requests.*Lower concurrency or wait, then resume"):
        open_transport(server, tmp_path, concurrency=1).send([[request(f"{i}+1")] for i in range(6)])
    server.fault = lambda number: None
    asked = open_transport(server, tmp_path)
    asked.send([[request(f"{i}+1")] for i in range(6)])
    assert counts(asked)["cache_hits"] == 3
    assert max(Counter(server.generated).values()) == 1


def test_a_server_that_dies_and_comes_back_costs_nothing_but_time(server, tmp_path):
    server.fault = lambda number: "restart" if number == 4 else None
    chains = [[request(f"{i}+1")] for i in range(6)]
    responses = open_transport(server, tmp_path, concurrency=1, max_retries=6).send(chains)
    assert all(row[0] is not None for row in responses)
    assert max(Counter(server.generated).values()) == 1


def test_a_server_that_stays_away_stops_the_run_saying_what_to_do(server, tmp_path):
    server.fault = lambda number: "die" if number == 3 else None
    with pytest.raises(ServerError, match=r"no connection. Is it running, is base_url right\? Start it and resume"):
        open_transport(server, tmp_path, concurrency=1).send([[request(f"{i}+1")] for i in range(6)])
    server.start()
    server.fault = lambda number: None
    asked = open_transport(server, tmp_path)
    asked.send([[request(f"{i}+1")] for i in range(6)])
    assert counts(asked)["cache_hits"] == 2
    assert max(Counter(server.generated).values()) == 1


@pytest.mark.parametrize(
    ("budget", "most"),
    [({"max_requests": 5}, 5), ({"max_tokens": 40}, 4), ({"max_cost": 4e-5}, 4)],
    ids=["requests", "tokens", "money"],
)
def test_a_budget_stops_the_run_before_it_is_passed_and_holds_over_restarts(budget, most, server, tmp_path):
    prices = {"price_per_million": [1.0, 1.0]}
    name, limit = next(iter(budget.items()))
    chains = [[request(f"{i}+1", max_tokens=6)] for i in range(9)]
    for _ in range(2):
        with pytest.raises(ServerError, match=f"could pass {name}={limit}. Raise it and resume"):
            open_transport(server, tmp_path, **prices | budget).send(chains)
    assert server.requests >= most - 1
    requests, prompt, completion = account(tmp_path)
    spent = {"max_requests": requests, "max_tokens": prompt + completion, "max_cost": (prompt + completion) / 1e6}
    assert requests == server.requests
    assert 0.7 * limit <= spent[name] <= limit
    asked = open_transport(server, tmp_path)
    asked.send(chains)
    assert max(Counter(server.generated).values()) == 1


def test_a_run_resumed_on_another_number_of_processes_shares_out_what_is_left(server, tmp_path):
    def start(ranks: int, world_size: int, max_requests: int = 12) -> list[int]:
        """Requests of each rank until the budget stops it."""
        found = []
        options = {"world_size": world_size, "max_requests": max_requests}
        transports = [open_transport(server, tmp_path, rank=rank, **options) for rank in range(ranks)]
        for asked in transports:
            before = server.requests
            with pytest.raises(ServerError, match=f"could pass max_requests={max_requests}"):
                asked.send([[request(f"{before}+{i}")] for i in range(20)])
            found.append(server.requests - before)
        return found

    assert start(2, 4) == [3, 3]  # the other two of the four had nothing to ask
    assert start(1, 1) == [6]
    assert start(4, 4) == [0] * 4
    assert start(1, 2, max_requests=20) == [4]
    other = open_transport(server, tmp_path, run="other", max_requests=1)
    assert other.send([[request("1+2")]])[0][0] is not None


def test_servers_of_two_teachers_do_not_answer_for_each_other_though_their_models_have_one_name(server, tmp_path):
    for name in ("near", "far"):
        open_transport(server, tmp_path, teacher=name).send([[request("1+2")]])
    assert server.requests == 2


@pytest.mark.parametrize(("fault", "booked"), [("cut", (2, 6, 12)), ("504", (2, 6, 12)), ("500", (2, 0, 0))])
def test_a_lost_response_counts_in_the_budget_as_much_as_it_can_have_cost(fault, booked, server, tmp_path):
    server.fault = lambda number: fault
    with pytest.raises(ServerError):
        open_transport(server, tmp_path, max_retries=1).send([[request("1+2", max_tokens=6)]])
    assert account(tmp_path) == booked


def test_what_a_request_under_way_may_cost_is_booked_before_it_is_sent(server, tmp_path):
    """So that a process which is killed in the meantime has booked it."""
    server.fault = lambda number: "hang"
    asked = open_transport(server, tmp_path, max_retries=0)
    with ThreadPool(1) as pool:
        waiting = pool.apply_async(asked.send, ([[request("1+2")]],))
        while not server.requests:
            time.sleep(0.05)
        assert account(tmp_path) == (1, 3, 6)
        server.release.set()
        with pytest.raises(ServerError, match=r"1 of 1 .*the connection broke"):
            waiting.get()


def test_a_response_longer_than_asked_for_counts_in_the_budget_as_the_server_says(server, tmp_path):
    server.fault = lambda number: "longer"  # by 1000 tokens
    limits = {"max_retries": 5, "max_tokens": 1500}
    with pytest.raises(ServerError, match="could pass max_tokens=1500"):
        open_transport(server, tmp_path, **limits).send([[request("1+2")]])
    assert server.requests == 2
    assert account(tmp_path)[2] > 2000


def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEST_KEY", SECRET)
    open_transport(server, tmp_path, api_key_env="TEST_KEY").send([[request("1+2")]])
    assert server.headers == [f"Bearer {SECRET}"]
    server.fault = lambda number: "401"  # this server repeats the key in its error
    with pytest.raises(ServerError, match=r"HTTP 401: .*Bearer \[key\].*api_key_env names \(TEST_KEY\)") as caught:
        open_transport(server, tmp_path, api_key_env="TEST_KEY").send([[request("3+4")]])
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET not in "".join(capfd.readouterr())


def test_no_part_of_the_key_is_left_where_the_servers_words_are_cut(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", SECRET)
    server.fault = lambda number: "401, at length"
    with pytest.raises(ServerError, match=r"Bearer \[key\]") as caught:
        open_transport(server, tmp_path, api_key_env="TEST_KEY").send([[request("1+2")]])
    assert SECRET[:4] not in str(caught.value)


def test_a_probe_is_asked_anew_each_time_charged_and_says_what_went_wrong(server, tmp_path):
    for _ in range(2):
        asked = open_transport(server, tmp_path)
        response = asked.probe(request("1+2"), advice="")
        assert counts(asked)["requests"] == 0  # a step's numbers are those of its own requests
    assert server.requests == 2
    asked.send([[request("1+2")]])
    assert server.requests == 3
    assert account(tmp_path) == (3, 9, 3 * response.used.completion)
    server.fault = lambda number: "422"
    with pytest.raises(ServerError, match=r"check at start .*: HTTP 422: .*too long for me.*\. Use another"):
        asked.probe(request("1+2"), advice="Use another")
    server.fault = lambda number: "hang"
    with pytest.raises(ServerError, match=r"no response within timeout_s=0.3. Use another"):
        open_transport(server, tmp_path, timeout_s=0.3, max_retries=0).probe(request("1+2"), advice="Use another")


def test_a_key_that_is_not_set_and_a_key_in_place_of_its_name_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable TEST_KEY, which is not set"):
        open_transport(server, tmp_path, api_key_env="TEST_KEY")
    with pytest.raises(ValidationError, match="must be the name of an environment variable") as caught:
        config(server, api_key_env=SECRET)
    assert SECRET not in str(caught.value)


def test_without_a_key_none_is_taken_from_elsewhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    open_transport(server, tmp_path).send([[request("1+2")]])
    assert server.headers == ["Bearer none"]


def test_a_server_that_is_not_there_is_said_after_the_retries(tmp_path):
    with pytest.raises(ServerError, match="no connection"):
        open_transport(FaultyServer(), tmp_path, max_retries=1).send([[request("1+2")]])


@pytest.fixture
def certificate(tmp_path):
    """A self-made one for 127.0.0.1, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    file = tmp_path / "certificate.pem"
    options = ["-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *options, "-keyout", f"{file}.key", "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_name(f"{file.name}.key").read_text())
    return file


def test_a_certificate_that_is_not_trusted_is_told_from_no_connection_and_gets_no_key(
    certificate, tmp_path, monkeypatch
):
    monkeypatch.setenv("TEST_KEY", SECRET)
    with FaultyServer(certificate=certificate) as server:
        with pytest.raises(ServerError, match=r"certificate is not trusted: .*self-signed.*SSL_CERT_FILE.* and resume"):
            open_transport(server, tmp_path, api_key_env="TEST_KEY", max_retries=0).send([[request("1+2")]])
        assert (server.requests, account(tmp_path)) == (0, (1, 0, 0))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        open_transport(server, tmp_path, api_key_env="TEST_KEY").send([[request("1+2")]])
        assert server.headers == [f"Bearer {SECRET}"]


@pytest.mark.parametrize("proxy", [f"foo://me:{SECRET}@host:1", f"socks5://me:{SECRET}@host:1"])
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(proxy, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ConfigError, match="the proxy that HTTPS_PROXY or ALL_PROXY names cannot be used") as caught:
        open_transport(server, tmp_path).send([[request("1+2")]])
    assert SECRET not in str(caught.value)


def body(*, text: object = "1", usage: object = None, **choice) -> bytes:
    choices = [{"text": text, "finish_reason": "stop"} | choice]
    return json.dumps({"choices": choices, "usage": usage or {"prompt_tokens": 1, "completion_tokens": 1}}).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_BODIES = {
    "nothing": b"", "null": b"null", "a list": b"[]", "a number": b"1", "nested": DEEP,
    "nested choices": b'{"choices": ' + DEEP + b"}", "no choices": b"{}", "choices of null": b'{"choices": null}',
    "choices of text": b'{"choices": "abc"}', "choices of numbers": b'{"choices": [1]}',
    "an integer of 5000 digits": b'{"choices": [' + b"1" * 5000 + b"]}", "text of null": body(text=None),
    "text of numbers": body(text=1), "half a surrogate": body(text="\ud800"), "usage of text": body(usage="many"),
    "not UTF-8": b'{"choices": [{"text": "\xff"}]}', "a reason of another type": body(finish_reason=["stop"]),
    "log-probabilities of text": body(prompt_logprobs="abc"), "of null": body(prompt_logprobs=[{"1": None}]),
    "of an integer no float holds": body(prompt_logprobs=[{"1": {"logprob": 10**400}}]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("content", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_of_any_other_shape_is_a_lost_response(content, status, server, tmp_path):
    server.fault = lambda number: Body(content, {"Content-Type": "application/json; charset=idna"}, status)
    with pytest.raises(ServerError, match=r"1 of 1 responses of this step were lost"):
        open_transport(server, tmp_path, max_retries=0).send([[request("1+2")]])
    assert account(tmp_path) == ((1, 3, 6) if status == 200 else (1, 0, 0))


@pytest.mark.parametrize("count", [-1000, float("inf"), float("nan"), 10**30, 1.5, True, "7", None])
def test_a_count_of_tokens_that_cannot_be_true_is_booked_as_the_most(count, server, tmp_path):
    server.fault = lambda number: Body(body(usage={"prompt_tokens": count, "completion_tokens": count}))
    ((response,),) = open_transport(server, tmp_path).send([[request("1+2")]])
    assert response.texts == ("1",)
    assert account(tmp_path) == (1, 3, 6)


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_body_of_any_size_takes_bounded_memory(packed, status, server, tmp_path):
    huge = b" " * 2**27
    reply = Body(gzip.compress(huge), {"Content-Encoding": "gzip"}, status) if packed else Body(huge, {}, status)
    server.fault = lambda number: reply
    tracemalloc.start()
    with pytest.raises(ServerError):
        open_transport(server, tmp_path, max_retries=0).send([[request("1+2")]])
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_body_that_drips_ends_at_the_time_limit_of_a_request(server, tmp_path):
    server.fault = lambda number: "drip"
    with pytest.raises(ServerError, match=r"no response within timeout_s=0.3"):
        open_transport(server, tmp_path, timeout_s=0.3, max_retries=0).send([[request("1+2")]])


def test_nothing_from_the_environment_goes_to_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", SECRET)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Mine: {SECRET}\nAuthorization: {SECRET}")
    open_transport(server, tmp_path).send([[request("1+2")]])
    sent = {"host", "content-type", "content-length", "user-agent", "authorization", "accept-encoding"}
    assert set(server.all_headers[0]) == sent
    assert server.headers == ["Bearer none"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_nothing_to_another_host(status, server, tmp_path):
    with FaultyServer() as other:
        place = {"Location": f"{other.url}/completions?key={SECRET}"}
        server.fault = lambda number: Body(b"", place, status)
        with pytest.raises(ServerError, match=f"HTTP {status}.*redirects to another address") as caught:
            open_transport(server, tmp_path).send([[request("1+2")]])
        assert (server.requests, other.requests) == (1, 0)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://h/v1?key=", "http://h/v1#", "http://me:pass@h/v1?", "http://", "http://h:0/", "http://a b/"]
)
def test_an_address_with_a_secret_in_it_is_refused_without_repeating_it(address, server):
    with pytest.raises(ValidationError, match="must look like http://host:port/v1") as caught:
        config(server, base_url=address + SECRET * (address != "http://"))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["hf_abcdefgh", "sk-abc", "A B"])
def test_a_key_that_looks_like_a_name_is_refused_too(key, server):
    with pytest.raises(ValidationError, match="environment variable in capitals") as caught:
        config(server, api_key_env=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-\u00e9", "a b", "a\nX-Other: b"])
def test_a_key_that_no_header_can_hold_is_refused_at_the_start(key, server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(ConfigError, match="the key in TEST_KEY has characters"):
        open_transport(server, tmp_path, api_key_env="TEST_KEY")
    monkeypatch.setenv("TEST_KEY", f"{SECRET}\n")  # as `$(cat file)` of some shells leaves it
    open_transport(server, tmp_path, api_key_env="TEST_KEY").send([[request("1+2")]])
    assert server.headers == [f"Bearer {SECRET}"]


def test_the_cache_keeps_numbers_and_not_what_else_the_server_said(server, tmp_path):
    row = {str(i): {"logprob": -1.2345678901234567 - i / 7, "rank": i, "decoded_token": "x" * 40} for i in range(20)}
    given = body(prompt_logprobs=[None, *[row] * 50], system_fingerprint=SECRET)
    server.fault = lambda number: Body(given)
    asked, wanted = open_transport(server, tmp_path), request("1+2")
    (first,), (again,) = asked.send([[wanted]]) + asked.send([[wanted]])
    assert server.requests == 1
    assert (again.texts, again.finished, again.used) == (first.texts, first.finished, first.used)
    assert again.logprobs[0] is None
    assert again.logprobs[1] == {i: pytest.approx(x["logprob"], rel=1e-8) for i, x in row.items()}
    with sqlite3.connect(tmp_path / "cache.sqlite") as database:
        (kept,) = database.execute("SELECT body FROM responses").fetchone()
    assert SECRET.encode() not in kept


@pytest.mark.parametrize("content", [b"no database" * 1000, "a folder"], ids=["other file", "folder"])
def test_a_cache_that_is_no_database_is_named(content, server, tmp_path):
    file = tmp_path / "cache.sqlite"
    file.write_bytes(content) if isinstance(content, bytes) else file.mkdir()
    with pytest.raises(ServerError, match=r"cache.sqlite cannot be used as the teacher's cache"):
        open_transport(server, tmp_path)


def test_a_cache_that_cannot_be_read_any_more_ends_the_step_with_its_name(server, tmp_path):
    """While requests are under way, whose responses are paid for."""
    asked = open_transport(server, tmp_path, concurrency=2)

    def damage(number: int) -> None:
        if number == 2:
            for file in tmp_path.glob("cache.sqlite*"):
                file.write_bytes(b"no database" * 10_000)

    server.fault = damage
    with pytest.raises(ServerError, match=r"cache.sqlite cannot be used as the teacher's cache: .*move it away"):
        asked.send([[request(f"{i}+2")] for i in range(4)])
    assert server.requests <= 3


def test_a_disk_that_fills_up_in_a_step_is_said_and_nothing_more_is_sent(server, tmp_path):
    asked = open_transport(server, tmp_path, concurrency=1)
    asked.send([[request("1+2")]])
    with room(1024), pytest.raises(DiskError, match=r"cannot write .*cache.sqlite: .*make room, then go on"):
        asked.send([[request(f"{i}+2")] for i in range(4)])
    assert server.requests == 1
    asked.send([[request("1+2")]])
    assert server.requests == 1


def test_a_damaged_response_in_the_cache_is_requested_again(server, tmp_path):
    asked = open_transport(server, tmp_path)
    for damaged in (b"abc", "{", DEEP.decode()):
        asked.send([[request("1+2")]])
        with sqlite3.connect(tmp_path / "cache.sqlite") as database:
            database.execute("UPDATE responses SET body = ?", (damaged,))
    assert asked.send([[request("1+2")]])[0][0] is not None
    assert server.requests == 4
