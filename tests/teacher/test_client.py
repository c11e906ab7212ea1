"""The client against a real server that misbehaves: what is lost is counted, nothing is paid twice, no budget is passed."""

import json
import sqlite3
import threading
from collections import Counter

import pytest

from oprd.config.models import ServerTeacherConfig
from oprd.errors import ConfigError, ServerError
from oprd.teacher.client import Client
from oprd.teacher.reply import Call
from serving import TEACHER, FaultyServer

SECRET = "sk-very-secret-0123456789"


def config(server: FaultyServer, **changes) -> ServerTeacherConfig:
    return ServerTeacherConfig(
        base_url=server.url,
        model="teacher",
        tokenizer=str(TEACHER),
        **{"request_timeout_s": 10.0, "step_timeout_s": 20.0, "max_retries": 2, "max_lost_share": 0.5} | changes,
    )


def client(server: FaultyServer, folder, **changes) -> Client:
    return Client(config(server, **changes), cache=folder / "cache.sqlite", run="run")


def call(text: str, samples: int = 1, max_tokens: int = 6) -> Call:
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 1.0} | ({"n": samples} if samples > 1 else {})
    return Call(
        endpoint="completions",
        body=body,
        samples=samples,
        most_prompt_tokens=len(text),
        most_completion_tokens=samples * max_tokens,
    )


CALLS = [[call(f"{i}+{j}") for j in range(3)] for i in range(4)]


def counts(client: Client) -> dict[str, float]:
    return {tally.name.split("/")[1]: tally.total for tally in client.tallies()}


def account(folder) -> tuple[int, int, int]:
    """Requests, prompt tokens and completion tokens."""
    with sqlite3.connect(folder / "cache.sqlite") as database:
        return database.execute("SELECT requests, prompt_tokens, completion_tokens FROM accounts").fetchone()


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


def test_equal_calls_of_a_step_are_different_draws_and_the_same_step_again_is_not_paid_again(server, tmp_path):
    asked = client(server, tmp_path)
    chains = [[call("1+2", max_tokens=12)] for _ in range(6)]
    first = asked.send(chains)
    assert len({reply.choices[0].text for (reply,) in first}) > 1
    assert counts(asked) == {
        "requests": 6, "retries": 0, "cache_hits": 0, "lost": 0, "prompt_tokens": 18, "cost": 0.0,
        "completion_tokens": sum(reply.completion_tokens for (reply,) in first),
    }  # fmt: skip
    again = client(server, tmp_path)
    assert again.send(chains) == first
    assert counts(again)["cache_hits"] == 6
    assert server.requests == 6


def test_what_was_done_is_counted_until_it_is_read_and_once(server, tmp_path):
    asked = client(server, tmp_path)
    asked.send([[call("1+2")]])
    asked.send([[call("1+2")], [call("3+4")]])
    told = counts(asked)
    assert (told["requests"], told["cache_hits"], told["prompt_tokens"]) == (2, 1, 6)
    assert set(counts(asked).values()) == {0}


def test_what_was_lost_before_is_no_part_of_a_steps_share(server, tmp_path):
    server.fault = lambda number: "400" if number in {1, 2} else None
    asked = client(server, tmp_path, concurrency=1)
    asked.send([[call(f"{i}+2")] for i in range(4)])
    asked.send([[call(f"{i}+3")] for i in range(2)])
    assert counts(asked)["lost"] == 2


def test_another_model_temperature_or_length_is_another_question(server, tmp_path):
    client(server, tmp_path).send([[call("1+2")]])
    client(server, tmp_path).send([[call("1+2", max_tokens=5)]])
    Client(
        ServerTeacherConfig(base_url=server.url, model="other", tokenizer=str(TEACHER)),
        cache=tmp_path / "cache.sqlite",
        run="run",
    ).send([[call("1+2")]])
    assert server.requests == 3


def test_calls_of_a_chain_go_in_order_and_chains_side_by_side_up_to_the_limit(server, tmp_path):
    client(server, tmp_path, concurrency=2).send(CALLS)
    order = {json.loads(body)["prompt"]: at for at, body in enumerate(server.generated)}
    asked = [[order[f"{i}+{j}"] for j in range(3)] for i in range(4)]
    assert all(row == sorted(row) for row in asked)
    # two at a time: the last two chains begin after one of the first two has ended
    assert min(asked[2][0], asked[3][0]) > min(asked[0][2], asked[1][2])


@pytest.mark.parametrize("fault", ["500", "cut", "not json", "wrong json", "empty", "fewer", "longer", "429"])
def test_a_fault_that_passes_costs_a_retry_and_no_answer(fault, server, tmp_path):
    server.fault = lambda number: fault if number % 3 == 0 else None
    asked = client(server, tmp_path, max_retries=6)
    chains = [[call(f"{i}+{j}", samples=2) for j in range(2)] for i in range(4)]
    replies = asked.send(chains)
    assert all(reply is not None and len(reply.choices) == 2 for chain in replies for reply in chain)
    told = counts(asked)
    assert told["retries"] == server.requests - 8 > 0
    assert told["requests"] == server.requests
    calm = FaultyServer()
    with calm:
        assert client(calm, tmp_path / "calm").send(chains) == replies  # the faults changed no answer


@pytest.mark.parametrize("fault", ["500", "cut", "not json", "empty", "fewer", "longer"])
def test_a_fault_that_stays_loses_that_call_alone(fault, server, tmp_path):
    asked = client(server, tmp_path, max_retries=1, concurrency=1)
    server.fault = lambda number: fault if number in {1, 2} else None
    replies = asked.send([[call("1+2", samples=2)], [call("3+4", samples=2)]])
    assert [row[0] is None for row in replies] == [True, False]
    assert counts(asked)["lost"] == 1


def test_a_call_that_hangs_is_given_up_at_its_limit_and_the_rest_goes_on(server, tmp_path):
    server.fault = lambda number: "hang" if number == 1 else None
    asked = client(server, tmp_path, request_timeout_s=0.5, max_retries=0, concurrency=1)
    replies = asked.send([[call("1+2")], [call("3+4")]])
    assert replies[0] == [None]
    assert replies[1][0] is not None


def test_a_step_ends_at_its_limit_whatever_hangs(server, tmp_path):
    server.fault = lambda number: "hang" if number > 2 else None
    asked = client(server, tmp_path, step_timeout_s=1.0, concurrency=1)
    with pytest.raises(ServerError, match=r"2 of 4 replies .* \(2 x no reply within step_timeout_s=1\)"):
        client(server, tmp_path, step_timeout_s=1.0, max_lost_share=0.1).send([[call(f"{i}+1")] for i in range(4)])
    assert asked._cache.is_file()


def test_too_many_lost_replies_stop_the_run_saying_why(server, tmp_path):
    server.fault = lambda number: "500"
    with pytest.raises(
        ServerError, match=r"4 of 4 replies of this step were lost \(4 x HTTP 500\).*max_lost_share=0.5"
    ):
        client(server, tmp_path, max_retries=1).send([[call(f"{i}+1")] for i in range(4)])


@pytest.mark.parametrize("fault", ["400", "413", "422"])
def test_a_question_that_the_server_refuses_is_lost_alone_and_not_asked_again(fault, server, tmp_path):
    server.fault = lambda number: fault if number == 2 else None
    asked = client(server, tmp_path, concurrency=1)
    replies = asked.send([[call("1+2"), call("3+4"), call("5+6")]])
    assert [reply is None for reply in replies[0]] == [False, True, False]
    assert (counts(asked)["lost"], counts(asked)["retries"]) == (1, 0)
    server.fault = lambda number: fault
    with pytest.raises(ServerError, match=rf"1 of 3 .*1 x HTTP {fault}: .*too long for me.*raise max_lost_share"):
        client(server, tmp_path, max_lost_share=0.1).send([[call("1+2"), call("3+4"), call("5+6")]])


def test_a_model_that_the_server_does_not_know_stops_the_run_at_the_first_question(server, tmp_path):
    server.fault = lambda number: "404"
    with pytest.raises(ServerError, match=r"HTTP 404.*The server refuses what this recipe asks for"):
        client(server, tmp_path, concurrency=1, max_lost_share=0.9).send(CALLS)
    assert server.requests == 1


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("stop", True), ("eos_token", True), ("end_turn", True), ("length", False), ("model_length", False)],
)
def test_a_text_is_finished_only_if_the_model_ended_it(reason, finished, server, tmp_path):
    server.fault = lambda number: f"ends: {json.dumps(reason)}"
    ((reply,),) = client(server, tmp_path).send([[call("1+2", samples=2)]])
    assert [choice.finished for choice in reply.choices] == [finished] * 2


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "abort"])
def test_a_reply_that_was_withheld_or_broken_off_is_lost_and_not_asked_for_again(reason, server, tmp_path):
    server.fault = lambda number: f"ends: {json.dumps(reason)}" if number == 1 else None
    asked = client(server, tmp_path, concurrency=1)
    replies = asked.send([[call("1+2"), call("3+4")]])
    assert [reply is None for reply in replies[0]] == [True, False]
    assert server.requests == 2
    server.fault = lambda number: f"ends: {json.dumps(reason)}"
    with pytest.raises(ServerError, match=rf"finish_reason '{reason}'"):
        client(server, tmp_path).send([[call("5+6")]])


def test_without_a_reason_only_a_lone_text_shorter_than_asked_for_is_taken_as_finished(server, tmp_path):
    server.fault = lambda number: "ends: null"
    asked = client(server, tmp_path)

    def finished(samples: int, max_tokens: int) -> list[bool]:
        messages = [{"role": "user", "content": "12+34-5"}]
        chat = Call(
            endpoint="chat",
            body={"messages": messages, "max_tokens": max_tokens, "temperature": 1.0, "n": samples},
            samples=samples, most_prompt_tokens=100, most_completion_tokens=samples * max_tokens,
        )  # fmt: skip
        ((reply,),) = asked.send([[chat]])
        return [choice.finished for choice in reply.choices]

    assert finished(1, 200) == [True]
    assert finished(1, 2) == [False]
    assert finished(2, 200) == [False, False]


@pytest.mark.parametrize(
    ("retry_after", "least"),
    [("1.2", 1.2), ("0", 0.5), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5), ("soon", 0.5)],
)
@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_pause_is_as_long_as_the_server_asks_and_never_shorter_than_ours(fault, retry_after, least, server, tmp_path):
    server.fault = lambda number: fault if number == 1 else None
    server.retry_after = retry_after
    client(server, tmp_path, concurrency=1).send([[call("1+2")]])
    assert server.times[1] - server.times[0] >= least


def test_the_pause_that_the_server_asks_for_holds_for_every_request(server, tmp_path):
    server.fault = lambda number: "503" if number == 1 else None
    server.retry_after = "1.2"
    client(server, tmp_path, concurrency=1, max_retries=0).send([[call("1+2")], [call("3+4")]])
    assert server.times[1] - server.times[0] >= 1.2


def test_a_pause_that_outlasts_the_step_is_not_slept_through(server, tmp_path):
    server.fault = lambda number: "429"
    server.retry_after = "3600"
    asked = r"asks to wait 3600 s, longer than what is left of step_timeout_s=20"
    with pytest.raises(ServerError, match=rf"too many requests.*{asked}. Lower concurrency or wait, then resume"):
        client(server, tmp_path, concurrency=1).send([[call("1+2")]])
    assert server.requests == 1
    server.fault = lambda number: "503"
    with pytest.raises(ServerError, match=rf"1 of 1 .*HTTP 503.*{asked}"):
        client(server, tmp_path, concurrency=1).send([[call("1+2")]])
    assert server.requests == 2


def test_a_storm_of_429_stops_the_run_with_advice_and_what_was_answered_is_kept(server, tmp_path):
    server.fault = lambda number: "429" if number > 3 else None
    with pytest.raises(ServerError, match=r"too many requests.*Lower concurrency or wait, then resume"):
        client(server, tmp_path, concurrency=1).send([[call(f"{i}+1")] for i in range(6)])
    server.fault = lambda number: None
    asked = client(server, tmp_path)
    asked.send([[call(f"{i}+1")] for i in range(6)])
    assert counts(asked)["cache_hits"] == 3
    assert max(Counter(server.generated).values()) == 1


def test_a_server_that_dies_and_comes_back_costs_nothing_but_time(server, tmp_path):
    server.fault = lambda number: "die" if number == 4 else None
    threading.Timer(1.5, server.start).start()
    replies = client(server, tmp_path, concurrency=1, max_retries=5).send([[call(f"{i}+1")] for i in range(6)])
    assert all(row[0] is not None for row in replies)
    assert max(Counter(server.generated).values()) == 1


def test_a_server_that_stays_away_stops_the_run_saying_what_to_do(server, tmp_path):
    server.fault = lambda number: "die" if number == 3 else None
    with pytest.raises(ServerError, match=r"no connection. Is it running, is base_url right\? Start it and resume"):
        client(server, tmp_path, concurrency=1).send([[call(f"{i}+1")] for i in range(6)])
    server.start()
    server.fault = lambda number: None
    asked = client(server, tmp_path)
    asked.send([[call(f"{i}+1")] for i in range(6)])
    assert counts(asked)["cache_hits"] == 2
    assert max(Counter(server.generated).values()) == 1


@pytest.mark.parametrize(
    ("budget", "most"),
    [({"max_requests": 5}, 5), ({"max_tokens": 40}, 4), ({"max_cost": 4e-5}, 4)],
    ids=["requests", "tokens", "money"],
)
def test_a_budget_stops_the_run_before_it_is_passed_and_holds_over_restarts(budget, most, server, tmp_path):
    prices = {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 1.0}
    name, limit = next(iter(budget.items()))
    chains = [[call(f"{i}+1", max_tokens=6)] for i in range(9)]
    for _ in range(2):
        with pytest.raises(ServerError, match=f"could pass {name}={limit}. Raise it and resume"):
            client(server, tmp_path, **prices | budget).send(chains)
    assert server.requests >= most - 1
    requests, prompt, completion = account(tmp_path)
    spent = {"max_requests": requests, "max_tokens": prompt + completion, "max_cost": (prompt + completion) / 1e6}
    assert requests == server.requests
    assert 0.7 * limit <= spent[name] <= limit
    asked = client(server, tmp_path)
    asked.send(chains)
    assert max(Counter(server.generated).values()) == 1


def test_a_run_resumed_on_another_number_of_processes_shares_out_what_is_left(server, tmp_path):
    def start(ranks: int, processes: int, max_requests: int = 12) -> list[int]:
        """Requests of each rank until the budget stops it."""
        found = []
        limits = config(server, max_requests=max_requests)
        clients = [
            Client(limits, cache=tmp_path / "cache.sqlite", run="run", rank=rank, processes=processes)
            for rank in range(ranks)
        ]
        for asked in clients:
            before = server.requests
            with pytest.raises(ServerError, match=f"could pass max_requests={max_requests}"):
                asked.send([[call(f"{before}+{i}")] for i in range(20)])
            found.append(server.requests - before)
        return found

    assert start(2, 4) == [3, 3]  # the other two of the four had nothing to ask
    assert start(1, 1) == [6]
    assert start(4, 4) == [0] * 4
    assert start(1, 2, max_requests=20) == [4]
    other = Client(config(server, max_requests=1), cache=tmp_path / "cache.sqlite", run="other")
    assert other.send([[call("1+2")]])[0][0] is not None


def test_servers_of_two_teachers_do_not_answer_for_each_other_though_their_models_have_one_name(server, tmp_path):
    near, far = (
        Client(config(server), cache=tmp_path / "cache.sqlite", run="run", name=name) for name in ("near", "far")
    )
    near.send([[call("1+2")]])
    far.send([[call("1+2")]])
    assert server.requests == 2


def test_a_lost_reply_counts_in_the_budget_as_much_as_it_can_have_cost(server, tmp_path):
    server.fault = lambda number: "cut"
    with pytest.raises(ServerError):
        client(server, tmp_path, max_retries=1, max_lost_share=0.0).send([[call("1+2", max_tokens=6)]])
    assert account(tmp_path) == (2, 6, 12)


def test_a_reply_longer_than_asked_for_counts_in_the_budget_as_the_server_says(server, tmp_path):
    server.fault = lambda number: "longer"  # by 1000 tokens
    limits = {"max_retries": 5, "max_tokens": 1500}
    with pytest.raises(ServerError, match="could pass max_tokens=1500"):
        client(server, tmp_path, **limits).send([[call("1+2")]])
    assert server.requests == 2
    assert account(tmp_path)[2] > 2000


def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEST_KEY", SECRET)
    client(server, tmp_path, api_key_env="TEST_KEY").send([[call("1+2")]])
    assert server.headers == [f"Bearer {SECRET}"]
    server.fault = lambda number: "401"  # this server repeats the key in its error
    with pytest.raises(ServerError, match=r"HTTP 401: .*Bearer \[key\].*api_key_env names \(TEST_KEY\)") as caught:
        client(server, tmp_path, api_key_env="TEST_KEY").send([[call("3+4")]])
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET not in "".join(capfd.readouterr())


def test_no_part_of_the_key_is_left_where_the_servers_words_are_cut(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", SECRET)
    server.fault = lambda number: "401, at length"
    with pytest.raises(ServerError, match=r"Bearer \[key\]") as caught:
        client(server, tmp_path, api_key_env="TEST_KEY").send([[call("1+2")]])
    assert SECRET[:4] not in str(caught.value)


def test_a_probe_is_asked_anew_each_time_charged_and_says_what_went_wrong(server, tmp_path):
    for _ in range(2):
        asked = client(server, tmp_path)
        reply = asked.probe(call("1+2"), advice="")
        assert counts(asked)["requests"] == 0  # a step's numbers are those of its own requests
    assert server.requests == 2
    asked.send([[call("1+2")]])
    assert server.requests == 3
    assert account(tmp_path) == (3, 9, 3 * reply.completion_tokens)
    server.fault = lambda number: "422"
    with pytest.raises(ServerError, match=r"check at start .*: HTTP 422: .*too long for me.*\. Use another"):
        asked.probe(call("1+2"), advice="Use another")
    server.fault = lambda number: "hang"
    with pytest.raises(ServerError, match=r"no reply within request_timeout_s=0.3. Use another"):
        client(server, tmp_path, request_timeout_s=0.3, max_retries=0).probe(call("1+2"), advice="Use another")


def test_a_key_that_is_not_set_and_a_key_in_place_of_its_name_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable TEST_KEY, which is not set"):
        client(server, tmp_path, api_key_env="TEST_KEY")
    with pytest.raises(ConfigError, match="must be the name of an environment variable") as caught:
        config(server, api_key_env=SECRET)
    assert SECRET not in str(caught.value)


def test_without_a_key_none_is_taken_from_elsewhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    client(server, tmp_path).send([[call("1+2")]])
    assert server.headers == ["Bearer none"]


def test_a_server_that_is_not_there_is_said_after_the_retries(tmp_path):
    with pytest.raises(ServerError, match="no connection"):
        client(FaultyServer(), tmp_path, max_retries=1).send([[call("1+2")]])
