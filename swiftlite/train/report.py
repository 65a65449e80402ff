"""`report.html` of a run: one file that needs nothing else, readable on a desk and on a telephone.

Made from what the run already has (log rows, settings, account of the rows, one row with its mask, some answers); it trains
nothing and loads no model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from swiftlite.options.parse import Options
from swiftlite.train.batches import Sample
from swiftlite.train.charts import Line, chart, number
from swiftlite.train.log import duration
from swiftlite.train.plots import smooth
from swiftlite.train.show import runs

FILE = "report.html"
METRICS = {
    "eval_loss": "evaluation loss", "eval_token_acc": "token accuracy", "eval_exact_match": "exact match", "eval_rouge-l": "ROUGE-L",
}  # fmt: skip


def write_report(
    run: Path, rows: Sequence[Mapping[str, Any]], options: Options, args: Mapping[str, Any], data: str, sample: Sample, tokenizer: Any,
    info: Mapping[str, Any], answers: Sequence[Mapping[str, str]] = (),
) -> Path | None:  # fmt: skip
    """Write run/report.html and say so; None (and a note) where it cannot be written: the run itself is whole by then.

    rows: the log's; args: `sft_args.json`; data: the account of the rows as text; info: what `sft` returns;
    answers: {question, before, after, reference} of some evaluation rows, before may be missing.
    """
    path, aside = run / FILE, run / f".{FILE}"
    try:
        aside.write_text(page(run, rows, options, args, data, sample, tokenizer, info, answers), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        print(f"note: no {FILE}: {error}")
        return None
    print(f"report: {path}")
    return path


def page(
    run: Path, rows: Sequence[Mapping[str, Any]], options: Options, args: Mapping[str, Any], data: str, sample: Sample, tokenizer: Any,
    info: Mapping[str, Any], answers: Sequence[Mapping[str, str]] = (),
) -> str:  # fmt: skip
    """The report as HTML."""
    name = args.get("model_type") or Path(str(args.get("model") or args["model_dir"])).name
    stopped = " · <strong>stopped early</strong>" if info["interrupted"] is not None else ""
    total = args["resolved"].get("total_steps")
    facts = f"{escape(run.name)} · {escape(str(options.tuner_type))} · step {info['global_step']:,}"
    facts += (f" of {total:,}" if total else "") + f" · {time.strftime('%Y-%m-%d %H:%M')}{stopped}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(name)} · {escape(run.name)}</title><style>{CSS}</style></head><body><main>'
        f"<header><h1>{escape(name)}</h1><p>{facts}</p></header>"
        f'<section class="tiles">{_tiles(rows, info)}</section><section class="charts">{_charts(rows)}</section>'
        f"<section><h2>Result</h2>{_result(info)}</section>{_answers(answers)}<section><h2>Data</h2>{_data(data)}</section>"
        f"<section><h2>One row; what is learnt is marked</h2>{_row(sample, tokenizer)}</section>"
        f"<section><h2>Settings</h2>{_settings(options, args)}</section>"
        f"<footer>swiftlite {escape(str(args['swiftlite_version']))}"
        " · every number is in logging.jsonl, every setting in sft_args.json</footer>"
        f"</main><script>{JS}</script></body></html>\n"
    )


def _tiles(rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> str:
    train = [row for row in rows if "loss" in row]
    seconds = info["train_time_s"]
    tiles = [("steps", f"{info['global_step']:,}", "")]
    if train:
        tiles.append(("training loss", number(train[-1]["loss"]), f"{number(train[0]['loss'])} at step {train[0]['global_step']}"))
    if info["best_metric"] is not None:
        evals = [row for row in rows if "eval_loss" in row]
        name = METRICS[info["metric"]]
        tiles.append((f"best {name}", number(info["best_metric"]), f"{number(evals[-1][info['metric']])} at the end" if evals else ""))
    if info["tokens"] and seconds:
        tiles.append(("tokens a second", number(round(info["tokens"] / seconds)), f"{info['tokens']:,} tokens"))
    tiles += [("time", duration(seconds), ""), ("peak memory", f"{info['memory_gb']:.2f} GB", "")]
    return "".join(f"<div><span>{label}</span><b>{value}</b><small>{note or '&nbsp;'}</small></div>" for label, value, note in tiles)


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(row["global_step"], row[key]) for row in rows if key in row and "global_step" in row]

    def curve(key: str) -> list[Line]:
        raw = points(key)
        smoothed = smooth([value for _, value in raw], max(0.5, min(0.9, 1 - 10 / len(raw)))) if raw else []
        even = [(step, value) for (step, _), value in zip(raw, smoothed, strict=True)]
        return [Line("as logged", raw, "raw"), Line("smoothed", even, "smooth")] if len(raw) > 5 else [Line("as logged", raw)]

    accuracy = [Line("training", points("token_acc"), "smooth"), Line("evaluation", points("eval_token_acc"), "eval")]
    figures = (
        chart("Loss", [*curve("loss"), Line("evaluation", points("eval_loss"), "eval")], wide=True),
        chart("Token accuracy", accuracy),
        chart("Answers", [Line("ROUGE-L", points("eval_rouge-l"), "eval"), Line("exact match", points("eval_exact_match"), "smooth")]),
        chart("Learning rate", [Line("learning rate", points("learning_rate"))], from_zero=True),
        chart("Gradient norm", curve("grad_norm"), from_zero=True),
        chart("Tokens a second", curve("tokens_per_s"), from_zero=True),
        chart("Peak memory", [Line("memory", points("memory_gb"))], "GB", from_zero=True),
    )
    return "".join(figures) or "<p>No step was logged.</p>"


def _result(info: Mapping[str, Any]) -> str:
    last, best = info["last_model_checkpoint"], info["best_model_checkpoint"]
    lines = [
        ("last checkpoint", last or "none"),
        ("best checkpoint", best or "none: no evaluation rows, or not kept"),
        ("run", info["run_dir"]),
    ]
    paths = "".join(f"<dt>{label}</dt><dd><code>{escape(str(value))}</code></dd>" for label, value in lines)
    if not last:
        return f"<dl>{paths}</dl>"
    commands = [("go on", f"swift sft --resume_from_checkpoint {last}")] if info["interrupted"] is not None else []
    commands += [("try it", f"swift infer --ckpt_dir {best or last}"), ("serve it", f"swift deploy --ckpt_dir {best or last}")]
    nexts = "".join(f"<dt>{label}</dt><dd><code class=command>{escape(command)}</code></dd>" for label, command in commands)
    return f"<dl>{paths}{nexts}</dl>"


def _answers(answers: Sequence[Mapping[str, str]]) -> str:
    names = (("before", "before training"), ("after", "after training"), ("reference", "the row's own"))
    blocks = []
    for row in answers:
        said = "".join(f"<dt>{title}</dt><dd>{escape(row[key]) or '–'}</dd>" for key, title in names if key in row)
        blocks.append(f'<dl class="answers"><dt>question</dt><dd><b>{escape(row["question"])}</b></dd>{said}</dl>')
    return f"<section><h2>Answers to evaluation rows</h2>{''.join(blocks)}</section>" if blocks else ""


def _data(table: str) -> str:
    body = []
    for line in table.splitlines():
        fate = line[:10].strip()  # the table's first column; it may hold a space
        count, _, note = line[10:].strip().partition(" ")
        body.append(
            f'<tr class="{escape(fate)}"><th>{escape(fate)}</th><td class=num>{escape(count)}</td><td>{escape(note.strip())}</td></tr>'
        )
    return f'<table class="data"><tbody>{"".join(body)}</tbody></table>'


def _row(sample: Sample, tokenizer: Any) -> str:
    pieces, more = runs(sample, tokenizer)
    text = "".join(f"<mark>{escape(piece)}</mark>" if target else escape(piece) for piece, target in pieces)
    rest = f" … {more:,} tokens more" if more else ""
    return f'<pre>{text}{rest}</pre><p class="hint">{len(sample.ids):,} tokens, {int(sample.mask.sum()):,} of them targets</p>'


def _settings(options: Options, args: Mapping[str, Any]) -> str:
    """What was chosen, by whom; flags left at their default are folded away."""
    decided = args["resolved"]
    chosen: list[str] = []
    defaults: list[str] = []
    for name in sorted({*options.values, *decided}):
        value, origin = options.values.get(name), options.origins.get(name, "default")
        if name in decided and (origin == "default" or value != decided[name]):
            value, origin = decided[name], f"decided (asked: {value})" if origin != "default" else "decided"
        shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else "–" if value is None else str(value)
        line = f"<tr><th>{name.replace('_', '_<wbr>')}</th><td><code>{escape(shown) or '–'}</code></td><td>{escape(origin)}</td></tr>"
        (defaults if origin == "default" else chosen).append(line)
    head = "<thead><tr><th>setting</th><th>value</th><th>from</th></tr></thead>"
    return (
        f'<table class="settings">{head}<tbody>{"".join(chosen)}</tbody></table>'
        f'<details><summary>{len(defaults)} settings at their default</summary><table class="settings">{head}<tbody>{"".join(defaults)}'
        "</tbody></table></details>"
    )


CSS = """
:root{color-scheme:light dark;--ground:#f6f5f2;--card:#fff;--ink:#1d1c1a;--soft:#66625b;--edge:#e4e1da;--main:#d9481c;--raw:#f3b9a3;
--eval:#1f6fb2;--mark:#ffe1b3;--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media(prefers-color-scheme:dark){:root{--ground:#161513;--card:#201f1c;--ink:#efece5;--soft:#a7a198;--edge:#37342f;--main:#ff7a4d;
--raw:#7d4a37;--eval:#6db3ef;--mark:#5b4312}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 var(--sans);overflow-wrap:anywhere}
main{max-width:1080px;margin:auto;padding:28px 20px 48px}h1{font-size:28px;line-height:1.2;margin:0}h2{font-size:18px;margin:36px 0 10px}
h3{font-size:15px;margin:0;font-weight:600}header p,.hint,footer{color:var(--soft);margin:4px 0 0;font-size:14px}footer{margin-top:40px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0 12px}
.tiles div,.card,table,pre,dl{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.tiles div{padding:12px 14px}.tiles span,.tiles small{display:block;color:var(--soft);font-size:13px}
.tiles b{display:block;font-size:24px;line-height:1.3;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}.card{margin:0;padding:14px 16px 10px;min-width:0}
.wide,.card:last-child:nth-child(even){grid-column:1/-1}.wide .area{height:300px}
figcaption{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;margin-bottom:12px}
.now{font-variant-numeric:tabular-nums;color:var(--soft);font-size:14px}
.key{font-size:13px;color:var(--soft);display:inline-flex;align-items:center;gap:6px}
.key:before{content:"";width:16px;height:3px;border-radius:2px;background:currentColor}
.key.raw:before{background:var(--raw)}.key.smooth:before,.key.plain:before{background:var(--main)}.key.eval:before{background:var(--eval)}
.plot{display:grid;grid-template-columns:auto 1fr;column-gap:8px}.area{position:relative;height:170px;touch-action:pan-y}
.area svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.ys{position:relative;min-width:52px}.xs{position:relative;grid-column:2;height:24px;margin-top:6px}
.ys span,.xs span{position:absolute;font-size:13px;line-height:1;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.ys span{right:0;transform:translateY(-50%)}.xs span{transform:translateX(-50%)}
.grid{stroke:var(--edge);fill:none;vector-effect:non-scaling-stroke;stroke-width:1}
.line,.dots{fill:none;stroke:var(--main);stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.dots{stroke-width:7}.raw{stroke:var(--raw)}.raw.line{stroke-width:1.5}.raw.dots{stroke-width:5}.smooth{stroke-width:2.5}
.eval{stroke:var(--eval)}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);display:none;pointer-events:none}
.readout{margin:0;min-height:1.5em;font-size:13px;color:var(--soft);font-variant-numeric:tabular-nums}
table{width:100%;border-collapse:separate;border-spacing:0;font-size:15px;margin:0}
td,th{padding:7px 12px;text-align:left;vertical-align:top;border-top:1px solid var(--edge)}
tr:first-child>*{border-top:0}thead+tbody tr:first-child>*{border-top:1px solid var(--edge)}
thead th{color:var(--soft);font-weight:400;font-size:13px}
tbody th{font-weight:500}.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.dropped th,.dropped .num{color:var(--main)}
.data th{width:1%;white-space:nowrap}.settings{table-layout:fixed}.settings td:last-child{color:var(--soft)}
.settings th:nth-child(2){width:44%}.settings th:nth-child(3){width:22%}
code,pre{font-family:var(--mono);font-size:14px}pre{padding:14px 16px;margin:0;white-space:pre-wrap;line-height:1.65}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:1px 0}
dl{margin:0;padding:6px 14px;display:grid;grid-template-columns:max-content minmax(0,1fr);gap:0 18px}dt{color:var(--soft);padding:6px 0}
dd{margin:0;padding:6px 0}
.answers{margin-bottom:10px}.answers dd{white-space:pre-wrap}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft);padding:6px 2px}
.command{user-select:all;background:var(--ground);border-radius:6px;padding:3px 7px;box-decoration-break:clone}
@media(max-width:640px){main{padding:18px 14px 36px}h1{font-size:24px}.tiles{grid-template-columns:1fr 1fr;gap:8px}
.charts{grid-template-columns:minmax(0,1fr)}
.wide .area{height:220px}dl{grid-template-columns:minmax(0,1fr)}dt{padding-bottom:0}dd{padding-top:0}td,th{padding:7px 9px}
.settings{font-size:14px}.settings th:nth-child(2){width:36%}
.settings th:nth-child(3){width:27%}}
@media print{body{background:#fff}.card,table,pre,dl{break-inside:avoid}}
"""

# Reading values off a curve by pointer; the page is whole without it.
JS = """
for(const f of document.querySelectorAll("figure")){const d=JSON.parse(f.querySelector("script").textContent),a=f.querySelector(".area"),
c=f.querySelector(".cross"),o=f.querySelector(".readout"),idle=o.textContent;
const near=(p,x)=>p.reduce((b,q)=>Math.abs(q[0]-x)<Math.abs(b[0]-x)?q:b);
a.addEventListener("pointermove",e=>{const r=a.getBoundingClientRect(),x=d.left+(d.right-d.left)*(e.clientX-r.left)/r.width;
const s=near(d.lines.map(l=>near(l[1],x)),x)[0];c.style.display="block";c.style.left=100*(s-d.left)/(d.right-d.left)+"%";
o.textContent="step "+s+": "+d.lines.map(l=>{const q=near(l[1],s);return q[0]===s?l[0]+" "+q[1]:null}).filter(Boolean).join(" · ")});
a.addEventListener("pointerleave",()=>{c.style.display="none";o.textContent=idle})}
"""
