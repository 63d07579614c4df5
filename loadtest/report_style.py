"""The report's style sheet. Colours: Okabe and Ito's palette for the colour-blind, darkened for white paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --grid: #e3e6ea; --card: #f7f8fa;
  --band: #eef1f5; --good: #1a6b3c; --bad: #b3261e;
  --s0: #0060a8; --s1: #c24e00; --s2: #00795a; --s3: #a8407f; --s4: #8a6d00; --s5: #4a5a68; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --soft: #a4adb8; --grid: #333a43;
  --card: #1b2026; --band: #222932; --good: #5fd08d; --bad: #ff8a80;
  --s0: #56b4e9; --s1: #f2944b; --s2: #2fcf9f; --s3: #e08fc0; --s4: #e6c545; --s5: #b0bcc8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.6rem; margin: 0.2em 0; } h2 { font-size: 1.05rem; margin: 0 0 0.2em; }
p { margin: 0.3em 0; } .small, figcaption p, caption { color: var(--soft); font-size: 0.87rem; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; padding-left: 0; list-style: none; }
.heads, .charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.heads { margin-bottom: 12px; } ol { margin: 0.3em 0; padding-left: 1.4em; }
figure { margin: 0; padding: 14px; min-width: 0; background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 4px; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 500; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; padding: 0; list-style: none;
  font-size: 0.87rem; }
.key { width: 26px; height: 10px; margin-right: 6px; } .chart { width: 100%; height: auto; display: block; }
.none { color: var(--soft); font-style: italic; } section { margin-top: 20px; }
.charts { margin-top: 16px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); } .band { fill: var(--band); }
.tick, .label, .phase { fill: var(--soft); font-size: 13px; } .phase { font-size: 12px; }
.mark { stroke: var(--soft); stroke-dasharray: 3 3; } .flag { fill: var(--soft); }
.flagged { fill: var(--paper); font-size: 11px; font-weight: 700; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.c0 { stroke: var(--s0); } .c1 { stroke: var(--s1); } .c2 { stroke: var(--s2); } .c3 { stroke: var(--s3); }
.c4 { stroke: var(--s4); } .c5 { stroke: var(--s5); }
.f0 { fill: var(--s0); } .f1 { fill: var(--s1); } .f2 { fill: var(--s2); } .f3 { fill: var(--s3); }
.f4 { fill: var(--s4); } .f5 { fill: var(--s5); }
""".strip()
