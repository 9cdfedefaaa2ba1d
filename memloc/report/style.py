"""The page's one style sheet: no font, image or script from anywhere; light, dark and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --wash: #f3f3ee; --ink: #1b1f24; --muted: #5c646e; --rule: #dcdfdb;
  --good: #1c6b40; --bad: #a5282c; --mark: #ffe28a; --mark-ink: #1b1f24; --bar: #b9cbe0;
  --series-0: #2a62a6; --series-1: #c7671f; --series-2: #5f8f3a; --series-3: #8a5aa8; --series-4: #a8324a;
  --serif: Charter, "Bitstream Charter", "Sitka Text", "Iowan Old Style", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --wash: #1e2227; --ink: #e6e6e1; --muted: #9aa2ab; --rule: #343a41;
    --good: #7fc79b; --bad: #f08c86; --mark: #6b5710; --mark-ink: #fff3cf; --bar: #37506e;
    --series-0: #7fb0e6; --series-1: #eda266; --series-2: #a5cf84; --series-3: #c5a0df; --series-4: #ee8ba0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1.0625rem/1.55 var(--serif); }
main { max-width: 68rem; margin: 0 auto; padding: 2.6rem 1.6rem 6rem; }
h1, h2, h3, h4 { line-height: 1.2; font-weight: 600; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 2.3rem; letter-spacing: -0.012em; margin: 0 0 0.5rem; }
h2 { font-size: 1.5rem; margin: 3.6rem 0 1rem; padding-top: 0.9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.14rem; margin: 2.2rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.6rem 0 0.4rem; }
p { max-width: 42rem; margin: 0.6rem 0; overflow-wrap: anywhere; text-wrap: pretty; }
.lead { font-size: 1.2rem; line-height: 1.5; margin: 0.9rem 0 0; }
.quiet, .byline, caption, figcaption, .below, nav, .legend, summary { color: var(--muted); font-family: var(--sans); }
.quiet { font-size: 0.86rem; }
.byline { font-size: 0.86rem; margin: 0; }
nav { font-size: 0.84rem; margin: 1.3rem 0 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.3rem; }
nav a { color: inherit; text-decoration: none; border-bottom: 1px solid var(--rule); }
nav a:hover { color: var(--ink); border-color: currentColor; }
.first h2 { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }

.verdicts { margin: 1.7rem 0 1.6rem; padding: 0.1rem 0 0.1rem 1.3rem; border-left: 4px solid var(--rule); }
.verdicts.good { border-color: var(--good); } .verdicts.bad { border-color: var(--bad); }
.verdicts > p { font-size: 1.4rem; font-weight: 600; line-height: 1.25; margin: 0 0 0.7rem; }
.verdicts ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 0.3rem; }
.verdicts li { display: grid; grid-template-columns: 1.5rem 1fr; overflow-wrap: anywhere; line-height: 1.4; }
.verdicts li > span { display: grid; grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); gap: 0 1.6rem;
  align-items: baseline; }
.verdicts .below { display: block; font-size: 0.84rem; line-height: 1.4; }
.verdicts li > b { font-family: var(--sans); }
.good { color: var(--good); } .bad { color: var(--bad); }
.verdicts.good, .verdicts.bad { color: inherit; }

.scroll { overflow-x: auto; margin: 0.9rem 0 1.3rem; }
table { border-collapse: collapse; font: 0.875rem/1.4 var(--sans); font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; padding: 0 0 0.4rem; font-size: 0.84rem; }
th, td { padding: 0.42rem 1.05rem 0.42rem 0; vertical-align: top; text-align: left; font-weight: 400; }
th:last-child, td:last-child { padding-right: 0.2rem; }
thead th { color: var(--muted); font-size: 0.78rem; line-height: 1.25; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.number { text-align: right; }
td.number { white-space: nowrap; }
tbody th { min-width: 11rem; max-width: 24rem; overflow-wrap: anywhere; }
tbody th.number { min-width: 0; white-space: nowrap; text-align: right; }
.code { font-family: var(--mono); font-size: 0.8rem; overflow-wrap: anywhere; min-width: 7rem; max-width: 26rem; }
.below { display: block; font-size: 0.76rem; line-height: 1.35; }
td .below { white-space: nowrap; }
td.code .below, td.text .below { white-space: normal; overflow-wrap: anywhere; }
td.text { max-width: 34rem; overflow-wrap: anywhere; }
caption { overflow-wrap: anywhere; }
td.quiet { color: var(--muted); font-size: inherit; }
td.good, td.bad { font-weight: 600; }
td .below, th .below { font-weight: 400; }
td.code .below { font-size: 0.76rem; }
.bar { display: block; height: 4px; margin: 0.25rem 0 0.2rem auto; width: 7rem; background: var(--rule); }
.bar i { display: block; height: 100%; background: var(--series-0); }
.pairs td { overflow-wrap: anywhere; max-width: 44rem; }
.pairs th { color: var(--muted); }

.full { width: 100%; }
.headline { width: 100%; font-size: 1.02rem; }
.headline thead th { font-size: 0.84rem; }
.headline td, .headline tbody th { padding-top: 0.6rem; padding-bottom: 0.55rem; }
.headline tbody th { font: 600 1.08rem/1.3 var(--serif); width: 34%; }
.headline tbody th .below { font-size: 0.84rem; margin-top: 0.1rem; }
.headline td:nth-child(3) { font-weight: 650; }
.headline td:nth-child(n+4) { color: var(--muted); }

details { margin: 0.7rem 0 1.1rem; }
summary { cursor: pointer; font-size: 0.86rem; padding: 0.15rem 0; overflow-wrap: anywhere; }
summary:hover { color: var(--ink); }
figure { margin: 1.2rem 0; max-width: 42rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; }
.beside figure { flex: 1 1 30rem; min-width: 0; } .beside .scroll { flex: 0 1 auto; min-width: 0; max-width: 100%; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 0.84rem; line-height: 1.4; margin-top: 0.45rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; font-size: 0.84rem; margin: 0 0 0.4rem; }
.legend span { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 0.75rem; height: 0.75rem; margin-right: 0.4rem; vertical-align: -0.05rem; }
.s0 { background: var(--series-0); } .s1 { background: var(--series-1); } .s2 { background: var(--series-2); }
.s3 { background: var(--series-3); } .s4 { background: var(--series-4); }

.passage { margin: 1.6rem 0; }
.passage h4 { font-family: var(--mono); font-size: 0.86rem; margin: 0 0 0.5rem; }
.passage .given { margin: 0 0 0.7rem; max-width: none; color: var(--muted); font-size: 0.95rem; }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.8rem; }
.said > div { background: var(--wash); padding: 0.65rem 0.85rem 0.75rem; min-width: 0; }
.said b { font: 600 0.78rem/1.3 var(--sans); display: block; margin-bottom: 0.3rem; }
.said p { margin: 0; font-size: 0.95rem; line-height: 1.5; white-space: pre-wrap; max-height: 26rem; overflow: auto; }
.strip { white-space: pre-wrap; line-height: 1.9; margin: 0; }
.strip .for { background: color-mix(in srgb, var(--series-0) calc(var(--share) * 0.7), transparent); }
.strip .against { background: color-mix(in srgb, var(--series-1) calc(var(--share) * 0.7), transparent); }
.strip .begins { border-left: 2px solid var(--ink); }
mark { background: var(--mark); color: var(--mark-ink); }
.differs { color: var(--muted); }
pre { font: 0.82rem/1.5 var(--mono); background: var(--wash); padding: 0.9rem 1.1rem; margin: 0.8rem 0;
  white-space: pre-wrap;  overflow-wrap: anywhere; }
dl { max-width: 46rem; margin: 1rem 0; display: grid; grid-template-columns: minmax(10rem, 15rem) 1fr;
  gap: 0.7rem 1.6rem; font-size: 0.98rem; }
dt { font-weight: 600; line-height: 1.35; } dd { margin: 0; line-height: 1.45; }

@media (max-width: 46rem) {
  main { padding: 1.8rem 1.1rem 4rem; }
  h1 { font-size: 1.75rem; }
  .lead { font-size: 1.08rem; }
  .verdicts { padding-left: 0.9rem; }
  .verdicts > p { font-size: 1.2rem; }
  .verdicts li > span { display: block; }
  .headline thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .headline, .headline tbody, .headline tr, .headline th, .headline td { display: block; width: auto; max-width: none; }
  .headline tbody tr { padding: 0.7rem 0; }
  .headline tbody tr + tr { border-top: 1px solid var(--rule); }
  .headline tbody tr + tr > * { border-top: 0; }
  .headline tbody th { width: auto; padding: 0 0 0.35rem; }
  .headline td { display: grid; grid-template-columns: minmax(6.5rem, 38%) 1fr; gap: 0 0.8rem; padding: 0.18rem 0;
    text-align: left; }
  .headline td::before { content: attr(data-label); color: var(--muted); font: 0.8rem/1.3 var(--sans); }
  .headline td.number { white-space: normal; }
  .headline .bar { margin-left: 0; }
  dl { grid-template-columns: 1fr; gap: 0.1rem; } dd { margin-bottom: 0.8rem; }
}
@media print {
  :root { --paper: #fff; --wash: #f4f4f4; --ink: #000; --muted: #444; --rule: #ccc; --good: #0b5a2e; --bad: #8f1418;
    --mark: #ffe28a; --mark-ink: #000; --series-0: #2a62a6; --series-1: #c7671f; --series-2: #5f8f3a;
    --series-3: #8a5aa8; --series-4: #a8324a; color-scheme: light; }
  @page { margin: 16mm 15mm; }
  html { font-size: 8.4pt; }
  body { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  th, td { padding-right: 0.7rem; }
  td.number { white-space: normal; } .headline td.number, .full td.number { white-space: nowrap; }
  tr, figure, .verdicts, .passage { break-inside: avoid; }
  h2, h3, h4, caption, summary { break-after: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
  .said p { max-height: none; }
}
""".strip()
