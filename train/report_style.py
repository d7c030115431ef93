"""The style sheet of report pages: one column on a phone, two on a desk, light or dark as the reader's system."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f6f3; --card: #ffffff; --line: #e4e1da; --text: #23262b; --quiet: #6c6f76; --accent: #1f5f8b;
  --mark: #fdeec2; --mark-text: #7a4d00; --good: #2e7d4f;
  --series-0: #9a9890; --series-1: #1f5f8b; --series-2: #c2571a; --series-3: #2e7d4f; --series-4: #8a4f9e;
  --series-5: #a88412;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181c; --card: #1e2126; --line: #31353c; --text: #e3e4e6; --quiet: #989ca4; --accent: #7db8e0;
    --mark: #4a3b12; --mark-text: #f3d58a; --good: #7fcf9f;
    --series-0: #7d7f84; --series-1: #6fb1de; --series-2: #ef9159; --series-3: #74c795; --series-4: #c38fd6;
    --series-5: #d8b74a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); line-height: 1.55; -webkit-text-size-adjust: 100%;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "PingFang SC", "Noto Sans CJK SC",
    "Noto Sans SC", "Microsoft YaHei", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.1rem 3.5rem; }
header p { margin: .2rem 0 0; color: var(--quiet); }
h1 { font-size: 1.65rem; font-weight: 650; letter-spacing: -.01em; margin: 0; line-height: 1.25; }
h2 { font-size: 1.12rem; font-weight: 650; margin: 2.6rem 0 .8rem; }
h3 { font-size: .92rem; font-weight: 600; margin: 0; }
.brand { color: var(--accent); font-size: .82rem; font-weight: 600; letter-spacing: .06em; margin: 0 0 .5rem; }
.status { color: var(--good); font-weight: 600; }
.status.warn { color: var(--series-2); }
.tiles {
  display: grid; gap: 1px; margin: 1.5rem 0 0; background: var(--line); border: 1px solid var(--line);
  border-radius: .6rem; overflow: hidden; grid-template-columns: repeat(4, 1fr);
}
@media (max-width: 44rem) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tile { background: var(--card); padding: .85rem 1rem .8rem; min-width: 0; }
.tile dt { color: var(--quiet); font-size: .78rem; }
.tile dd { margin: .1rem 0 0; font-size: 1.4rem; font-weight: 620; font-variant-numeric: tabular-nums; }
.tile dd small { font-size: .8rem; font-weight: 400; color: var(--quiet); }
.tile p { margin: 0; font-size: .76rem; color: var(--quiet); }
.tile.first dd { color: var(--accent); }
.charts { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.chart, .fill, .card {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem;
  min-width: 0;
}
.chart p { margin: .1rem 0 0; font-size: .78rem; color: var(--quiet); }
.chart svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
.chart text { fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--series-0); stroke-width: 1; opacity: .6; }
.chart path { fill: none; stroke: var(--key); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.chart path.faint { stroke-width: 1; opacity: .28; }
.chart path.dashed { stroke-dasharray: 5 4; stroke-width: 1.4; }
.chart path.dots { stroke-width: 1.2; opacity: .75; stroke-dasharray: 1 3; }
.chart .bar { fill: var(--series-1); opacity: .85; }
.chart circle { fill: var(--card); stroke: var(--key); stroke-width: 1.8; }
.unit { color: var(--quiet); font-weight: 400; font-size: .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin-top: .25rem; }
.key { font-size: .76rem; color: var(--quiet); display: inline-flex; align-items: center; gap: .35rem; }
.key::before { content: ""; width: 1.1rem; border-top: 2.5px solid var(--key); }
.key.dashed::before { border-top-style: dashed; border-top-width: 2px; }
.key.dots::before { width: .55rem; height: .55rem; border: 2px solid var(--key); border-radius: 50%; }
.fills { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.fill { display: flex; flex-direction: column; }
.fill blockquote {
  margin: 0 0 .8rem; font-size: .98rem; line-height: 1.75; white-space: pre-line; overflow-wrap: anywhere; flex: 1;
}
mark {
  background: var(--mark); color: var(--mark-text); border-radius: .25rem; padding: .05rem .4rem; font-weight: 600;
}
.answers { display: grid; gap: 0 .9rem; grid-template-columns: auto 1fr auto; margin: 0; font-size: .88rem; }
.answers > div { display: contents; }
.answers dt { color: var(--quiet); }
.answers dd { margin: 0; overflow-wrap: anywhere; font-weight: 600; }
.answers dd + dd { text-align: right; color: var(--quiet); font-weight: 400; font-variant-numeric: tabular-nums; }
.answers .right { color: var(--good); }
.answers .nothing { color: var(--quiet); font-weight: 400; font-style: italic; }
.hint { color: var(--quiet); font-size: .86rem; margin: -.3rem 0 .9rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--quiet); font-size: .78rem; }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.name { color: var(--quiet); white-space: nowrap; }
td { overflow-wrap: anywhere; }
pre {
  margin: 0; overflow-x: auto; font-size: .8rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
summary { cursor: pointer; color: var(--quiet); font-size: .88rem; }
details pre { margin-top: .8rem; }
.card h3 { margin-bottom: .6rem; }
section > .card + .card { margin-top: .9rem; }
footer { margin-top: 3rem; color: var(--quiet); font-size: .78rem; }
@media print { body { background: #fff; } .chart, .fill, .card { break-inside: avoid; } }
"""
