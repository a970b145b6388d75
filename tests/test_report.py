"""The page of experiments/report.py: its numbers against the log and a fresh dual pass, hostile text, and the page in a browser."""
import doctest
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

import pgpo
import train
from browser import CHROMIUM, Browser
from conftest import rows, write_rows
from experiments import logs, plot, report, show
from model import encode_prompt, load_policy, open_image
from rollout import sample_groups

HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- <script>", "x" * 3000, "\u202eright to left\u202c שלום مرحبا",
           "👩‍👩‍👧‍👦 é\u0301", "nul \x00 bell \x07 escape \x1b[31m", "&lt;b&gt; &amp;", "`code` {{rollouts}} \\u003c ${1}", "\ufffd half"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps, a second one with another seed, a third of another method, and the page of all of them."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(report.HERE.parent)
        data = [row | {"question": row["question"] + hostile, "answer": row["answer"]} for row, hostile in zip(rows(len(HOSTILE)), HOSTILE)]
        held_out = write_rows(folder / "held_out.jsonl", data)
        common = dict(eval_data=held_out, steps=3, prompts_per_rollout=4, prompts_per_update=4, group_size=4, max_response_tokens=48,
                      eval_samples=1, eval_every=3, save_every=0, device="cpu", max_rounds=1, learning_rate=1e-3)
        for name, flags in (("a", {}), ("b", {"seed": 1}), ("c", {"method": "dapo"})):
            train.main(train.Config(output_dir=str(folder / name), **common, **flags))
        report.main([str(folder / name) for name in "abc"] + ["--questions=5", "--device=cpu", "--lines=2,9"])
    return folder


def page_of(folder) -> tuple[str, list[dict]]:
    page = (folder / "a" / "report.html").read_text(encoding="utf-8")
    return page, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def charts_of(page: str) -> list[dict]:
    from html import unescape
    return [json.loads(unescape(text)) for text in re.findall(r'data-chart="(.*?)"', page)]


def test_the_examples_in_docstrings():
    assert doctest.testmod(report).failed == doctest.testmod(logs).failed == doctest.testmod(show).failed == doctest.testmod(plot).failed == 0


def test_curves_are_those_of_the_logs(made):
    """Three runs are two sets: two seeds of pgpo with a band, and dapo; every value is the log's, to six digits."""
    records = {name: logs.read_log(str(made / name)) for name in "abc"}
    accuracy, reward, *_ = charts_of(page_of(made)[0])
    band, mean, dapo, *dots = accuracy["curves"]
    steps = {name: dict(logs.points(log, "accuracy")) for name, log in records.items()}
    assert [curve["name"] for curve in accuracy["curves"]] == [
        "method pgpo, least to most", "method pgpo", "method dapo", "method pgpo, held out", "method dapo, held out"]
    assert band["low"] == [pytest.approx(min(steps_of[step] for steps_of in (steps["a"], steps["b"])), rel=1e-5) for step in (1, 2, 3)]
    assert mean["points"] == [[step, pytest.approx((steps["a"][step] + steps["b"][step]) / 2, rel=1e-5)] for step in (1, 2, 3)]
    assert band["points"] == [[step, pytest.approx(max(steps["a"][step], steps["b"][step]), rel=1e-5)] for step in (1, 2, 3)]
    assert dapo["points"] == [[step, pytest.approx(steps["c"][step], rel=1e-5)] for step in (1, 2, 3)]
    assert dots[1]["points"] == [[step, pytest.approx(value, rel=1e-5)] for step, value in logs.points(records["c"], "eval_accuracy")]
    assert reward["curves"][2]["points"] == [[step, pytest.approx(value, rel=1e-5)] for step, value in logs.points(records["c"], "reward")]


def test_seconds_are_stacked(made):
    log = logs.read_log(str(made / "c"))
    [seconds] = [chart for chart in charts_of(page_of(made)[0]) if chart["curves"][0]["name"] == "rollout"][1:]
    whole = [sum(record[f"seconds_{phase}"] for phase in report.PHASES) for record in log if "reward" in record]
    assert [y for _, y in seconds["curves"][-1]["points"]] == pytest.approx(whole, rel=1e-5)


def test_tokens_are_those_of_a_fresh_dual_pass(made):
    """With plain calls of the policy on each response alone, eq. 1-8 by the functions of pgpo.py; the trained policy, both questions."""
    _, questions = page_of(made)
    assert [question["where"].rpartition(" ")[2] for question in questions] == ["2", "9"]       # as asked for, also beyond --questions
    policy = load_policy(str(made / "a" / "model"))
    for question in questions:
        [example] = [row for row in report.load_examples(str(made / "held_out.jsonl"), None) if row["where"] == question["where"]]
        [before, after] = question["models"]
        assert [model["name"] for model in (before, after)] == ["before training", "after training"]
        assert len(after["responses"]) == 4 and before["responses"] != after["responses"]
        rewards = torch.tensor([[row["reward"] for row in after["responses"]]])
        assert rewards[0].tolist() == sorted(rewards[0].tolist(), reverse=True)
        advantages = pgpo.group_advantages(rewards)[0]
        prompt = encode_prompt(policy, example["question"], [open_image(path) for path in example["images"]])
        for row, advantage in zip(after["responses"], advantages.tolist()):
            text = "".join(row["tokens"])
            ids = policy.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            [group] = sample_groups(policy, [prompt], 1, max_response_tokens=1)
            mask = torch.ones_like(ids, dtype=torch.bool)
            if policy.tokenizer.decode(ids[0]) != text or len(ids[0]) != len(row["tokens"]):
                continue        # cut off, or sampled in other pieces than the tokenizer would choose
            group.responses, group.mask = ids, mask
            with torch.no_grad():
                logps, blind = policy([group])[0], policy([group], blind=True)[0]
            dependency = pgpo.visual_dependency(logps, blind)
            expected = {"logp": logps, "blind": blind, "S": dependency, "I": pgpo.dependency_score(dependency, mask),
                        "w~": pgpo.token_weights(dependency, mask), "A~": advantage * pgpo.token_weights(dependency, mask)}
            assert row["advantage"] == pytest.approx(advantage, abs=1e-5)
            for name, values in expected.items():
                assert row[name] == pytest.approx(values[0].tolist(), rel=2e-3, abs=2e-4), name
            checked = True
    assert checked


def test_pieces_join_to_the_text_and_have_one_token_each(policy):
    """Characters of several tokens appear with their last one."""
    text = "<think>é 👩 7\n</think>"
    ids = policy.tokenizer(text, return_tensors="pt").input_ids[0]
    found = show.pieces(policy.tokenizer, ids)
    assert "".join(found) == text and len(found) == len(ids) and "" in found
    assert show.pieces(policy.tokenizer, ids[:-1])[-1] != "" and "".join(show.pieces(policy.tokenizer, ids[:9])) == policy.tokenizer.decode(ids[:9])


def test_statistics_by_hand():
    def row(tokens, values, accuracy):
        return {"tokens": tokens, "S": values, "accuracy": accuracy}

    tokens = report.tokens_of("m", [row(["<think>", "see", " 7", ",", " 12", "circle"], [0, 1, 8, 0, 4, 2], 1.0), row(["3", "."], [6, 0.5], 0.0)])
    assert report.mean_s(tokens, ["m"], lambda token: token.kind) == [("all others", [pytest.approx(0.5 / 3)]), ("content words", [1.5]), ("numbers", [6.0])]
    assert report.mean_s([token for token in tokens if token.number], ["m"], lambda token: str(token.number)) == [("1", [7.0]), ("2", [4.0])]
    assert report.mean_s(tokens, ["m", "n"], lambda token: token.text if token.right else "") == [
        ("<think>", [0, None]), ("see", [1, None]), (" 7", [8, None]), (",", [0, None]), (" 12", [4, None]), ("circle", [2, None])]


def test_any_model_and_file_without_a_run(tmp_path, capsys):
    report.main(["--model", "tiny_data/model", "tiny_data/../tiny_data/model", "--data=tiny_data/test.jsonl", f"--output={tmp_path / 'page.html'}", "--questions=2", "--responses=2",
                 "--max_response_tokens=20", "--device=cpu"])
    page = (tmp_path / "page.html").read_text()
    assert '"name": "tiny_data/model"' in page and '"name": "tiny_data/../tiny_data/model"' in page and len(charts_of(page)) == 1
    assert f"{tmp_path / 'page.html'}: " in capsys.readouterr().out


def test_runs_that_are_not_whole(made, tmp_path):
    """An evaluation alone; a run of one step, killed: its newest checkpoint, the torn end of its log; a folder without flags."""
    for name in ("evaluated", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((made / "a" / "config.json").read_text())
    first, second, *_ = (made / "a" / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "evaluated" / "log.jsonl").write_text(first)
    (tmp_path / "killed" / "log.jsonl").write_text(first + second + second[:50])
    for step in (1, 2):
        shutil.copytree(made / "a" / "model", tmp_path / "killed" / "checkpoints" / f"step-00000{step}")
    (tmp_path / "killed" / "checkpoints" / "step-000003.partial").mkdir()
    for name in ("evaluated", "killed"):
        report.main([str(tmp_path / name), "--questions=1", "--device=cpu", "--responses=2"])
        page = (tmp_path / name / "report.html").read_text()
        assert ("after training (step-000002)" in page) == (name == "killed") and '"name": "before training"' in page
        assert ("seconds of a step" in page) == (name == "killed")
    (tmp_path / "killed" / "config.json").unlink()
    with pytest.raises(SystemExit, match="killed is no folder of a run: its config.json cannot be read"):
        report.main([str(tmp_path / "killed"), "--device=cpu"])
    (tmp_path / "evaluated" / "log.jsonl").write_text(first + "[1]\n")
    with pytest.raises(SystemExit, match="log.jsonl, line 2 is no record of train.py: '\\[1"):
        report.main([str(tmp_path / "evaluated"), "--device=cpu"])


def test_a_long_run_is_drawn_by_means_of_a_few_steps():
    """5,000 steps: at most 300 points, the mean of each few, with a band from the least to the most."""
    log = [{"step": step, "reward": float(step % 2)} for step in range(1, 5001)]
    band, mean = report.curves({"pgpo": [log]}, "reward")
    assert len(mean.points) <= 300 and mean.points[-1][0] == 5000 and all(abs(y - 0.5) < 0.05 for _, y in mean.points[:-1])
    assert set(band.low[:-1]) == {0.0} and {y for _, y in band.points[:-1]} == {1.0}


@pytest.mark.parametrize("flags,sentence", [
    ([], "give RUN folders, or --model"), (["nowhere"], "nowhere holds no run"), (["--model", "tiny_data/model"], "--data and --output"),
    (["run", "--questions", "0"], "at least 1"), (["run", "--lines", "a"], "--lines numbers"),
    (["--model", "nothing", "--data", "tiny_data/test.jsonl", "--output", "x.html"], "--model nothing: "),
    (["--model", "tiny_data/model", "--data", "nothing.jsonl", "--output", "x.html"], "nothing.jsonl: no such file"),
    (["--model", "tiny_data/model", "--data", "tiny_data/test.jsonl", "--output", "no/x.html"], "--output no/x.html: there is no such folder"),
    (["--model", "tiny_data/model", "--data", "tiny_data/test.jsonl", "--output", "x.html", "--lines", "3,999"], "no question on line 999")])
def test_a_wrong_flag_gets_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        report.main([*flags, "--device=cpu"])
    assert sentence in str(error.value) + capsys.readouterr().err


def test_size_and_no_address(made):
    page, _ = page_of(made)
    assert len(page) < 2_000_000
    assert not re.findall(r"(?:https?:)?//[a-z]", page.replace('xmlns="http://www.w3.org/2000/svg"', "")) and "Content-Security-Policy" in page


CONTRAST = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = box => { for (; box; box = box.parentElement) { const [r, g, b, a = 1] = parse(getComputedStyle(box).backgroundColor); if (a > 0) return [r, g, b]; }
                          return parse(getComputedStyle(document.body).backgroundColor); };
  let worst = [99, ""];
  for (const box of document.querySelectorAll("body *")) {
    if (!box.checkVisibility() || ![...box.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(box), ink = parse(box.closest("svg") ? style.fill : style.color);
    const [high, low] = [light(ink), light(behind(box))].sort((a, b) => b - a), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < worst[0]) worst = [ratio, box.outerHTML.slice(0, 200)];
  }
  return worst;
})()
"""


@pytest.fixture(scope="module")
def browsers(made, tmp_path_factory):
    """The page in a light, a dark and a small window."""
    if not CHROMIUM:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium: apt-get install chromium")
    kinds = {"light": (1280, False), "dark": (1280, True), "phone": (390, False)}
    opened = {name: Browser(f"file://{made / 'a' / 'report.html'}", tmp_path_factory.mktemp(name), *kind) for name, kind in kinds.items()}
    yield opened
    for browser in opened.values():
        browser.close()


def centre(browser, selector: str) -> tuple[float, float]:
    """Scroll to the first element, and where its middle is."""
    return browser.run(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; }})"
                       f"(document.querySelector({selector!r}))")


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_switches_hover_and_keys(made, browsers, name):
    browser, (_, questions) = browsers[name], page_of(made)
    row = questions[0]["models"][0]["responses"][0]
    painted = {}
    for place, view in enumerate(report.COLUMNS):
        browser.run(f"document.querySelectorAll('input[name=view]')[{place}].focus()")
        browser.run("document.activeElement.click()")
        painted[view] = browser.run("[...document.querySelectorAll('.response')].slice(0, 2).map(r => [...r.querySelectorAll('.token')].map(t => t.style.backgroundColor))")
        equation = browser.run("document.getElementById('equation').textContent")
        assert {"S": "eq. 1", "I": "eq. 4, 5", "w~": "eq. 6, 7", "A~": "eq. 8"}[view] in equation
    assert len({json.dumps(colours) for colours in painted.values()}) == 4
    # The largest value has the deepest colour, and what is 0 the card's own.
    largest, least = (choose(range(len(row["w~"])), key=row["w~"].__getitem__) for choose in (max, min))
    assert painted["w~"][0][largest] != painted["w~"][0][least] and row["w~"][least] < 0.01
    numbers = f"S {row['S'][largest]:g} · I {row['I'][largest]:g} · w~ {row['w~'][largest]:g}"
    browser.point(0, 0)
    browser.run(f"document.querySelector('.response').querySelectorAll('.token')[{largest}].id = 'here'")
    browser.point(*centre(browser, "#here"))
    shown = browser.run("document.getElementById('numbers').textContent")
    assert shown.startswith(f"token {largest + 1} of {len(row['tokens'])} ") and numbers in shown
    browser.run("document.querySelector('.response').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.getElementById('numbers').textContent").startswith(f"token {largest + 2} of ")
    browser.press("ArrowLeft")
    assert numbers in browser.run("document.getElementById('numbers').textContent")
    # A chart, with the pointer and with the keys: the values of its last and its last but one step.
    rewards = {run: dict(logs.points(logs.read_log(str(made / run)), "reward")) for run in "abc"}
    x, y = centre(browser, "figure:nth-of-type(2) svg")
    width = browser.run("document.querySelector('figure:nth-of-type(2) svg').getBoundingClientRect().width")
    browser.point(x + 0.4 * width, y)
    readout = "document.querySelector('figure:nth-of-type(2) .readout').textContent"
    assert browser.run(readout).startswith("step 3: ") and f"method dapo {rewards['c'][3]:.6g}" in browser.run(readout)
    browser.run("document.querySelector('figure:nth-of-type(2) svg').focus()")
    browser.press("ArrowLeft")
    assert browser.run(readout).startswith("step 2: ") and f"method dapo {rewards['c'][2]:.6g}" in browser.run(readout)


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_nothing_goes_wrong_and_nothing_leaves_the_page(browsers, name):
    events = browsers[name].events
    addresses = [event["params"]["request"]["url"] for event in events if event.get("method") == "Network.requestWillBeSent"]
    assert addresses and all(address.startswith(("file://", "data:")) for address in addresses)
    assert [event for event in events if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")] == []


@pytest.mark.parametrize("view", range(4))
@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_has_a_contrast_of_four_and_a_half(browsers, name, view):
    browsers[name].run(f"document.querySelectorAll('details').forEach(d => d.open = true); document.querySelectorAll('input[name=view]')[{view}].click()")
    ratio, where = browsers[name].run(CONTRAST)
    assert 4.5 <= ratio < 99, where


def test_no_element_is_wider_than_a_phone(browsers):
    wide = browsers["phone"].run("[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && e.getBoundingClientRect().right > 390.5)"
                                 ".map(e => e.outerHTML.slice(0, 100))")
    assert wide == [] and browsers["phone"].run("document.documentElement.scrollWidth") <= 390


def test_hostile_text_is_text(made, browsers):
    """Of a question, an answer, a response: no element comes of it; control characters are shown as pictures."""
    browser, page = browsers["light"], made / "hostile.html"
    text, questions = page_of(made)
    for row in (questions[0]["models"][0]["responses"][0], questions[0]["models"][0]["responses"][1]):
        row["tokens"] = (HOSTILE * 9)[:len(row["tokens"])]
    questions[0] |= {"question": "".join(HOSTILE), "answer": HOSTILE[0], "where": HOSTILE[1]}
    example = {question["where"]: {"question": question["question"], "answer": question["answer"], "images": []} for question in questions}
    answers = {HOSTILE[1]: {question["where"]: question["models"][0]["responses"] for question in questions}}
    data = report.rollouts_section(answers, example)
    before = browser.run("document.querySelectorAll('script').length")
    page.write_text(re.sub(r'(id="data">).*?(</script>)', lambda found: found[1] + data + found[2], text, flags=re.DOTALL), encoding="utf-8")
    browser.call("Page.navigate", url=f"file://{page}")
    while browser.run("document.readyState + location.pathname.slice(-12)") != "completehostile.html":
        pass
    assert browser.run("document.querySelectorAll('script').length") == before and browser.run("document.querySelectorAll('img[src=x]').length") == 0
    shown = browser.run("document.querySelector('article').textContent")
    for hostile in HOSTILE:
        assert hostile.translate({c: 0x2400 + c for c in (0, 7, 27)}) in shown
    tokens = browser.run("[...document.querySelector('.response').querySelectorAll('.token')].map(t => t.textContent)")
    assert len(tokens) == len(questions[0]["models"][0]["responses"][0]["tokens"])
    assert browser.run("[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && e.getBoundingClientRect().right > 1280.5).length") == 0
    titles = report.gallery(["<script>", "b"], [(plot.bars("<b>", [("</text><script>", [1.0])], ["a"]), "<i>`x`</i>")])
    assert "<script>" not in titles and "<b>" not in titles and "<i>" not in titles and "<code>x</code>" in titles


def seen(colour: str, matrix: list[list[float]]) -> np.ndarray:
    """A colour #rrggbb as somebody with a colour deficiency sees it, linear RGB."""
    channels = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.array(matrix) @ np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("matrix", [[[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],       # protanopia
                                    [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],        # deuteranopia
                                    [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]])      # tritanopia
def test_the_two_ends_of_the_scale_are_told_apart_by_the_colour_blind(matrix):
    """Of Machado et al. 2009, severity 1. The first three curves too."""
    style = (report.HERE / "report.html").read_text()
    pairs = list(zip(re.findall(r"--high: (#\w+)", style), re.findall(r"--low: (#\w+)", style)))
    assert len(pairs) == 2
    for one, other in [*pairs, *zip(plot.COLOURS[:2], plot.COLOURS[1:3])]:
        assert np.linalg.norm(seen(one, matrix) - seen(other, matrix)) > 0.15
