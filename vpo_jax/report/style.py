"""The report page's style sheet: light and dark, no fonts or scripts from elsewhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1c1a; --soft: #6f6b64; --line: #e4e0d9;
  --good: #1a7f53; --bad: #b3422e; --level: #8a857c;
  --c0: #2f6db5; --c1: #c9632b; --c2: #2b8a6e; --c3: #8a57b0; --c4: #a88414; --c5: #c04478;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --card: #1f1f1d; --ink: #ece9e3; --soft: #a09b92; --line: #35332f;
    --good: #55c596; --bad: #ee8a72; --level: #8a857c;
    --c0: #7db1ec; --c1: #f0a070; --c2: #6fcdb0; --c3: #c39be3; --c4: #dcc05c; --c5: #f08db5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 52px 0 4px; }
p.note { color: var(--soft); margin: 0 0 16px; max-width: 76ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-top: 26px; }
.cards > div, figure, .chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.cards > div { padding: 14px 16px; }
.cards b { display: block; font-size: 26px; letter-spacing: -0.02em; font-weight: 650; line-height: 1.3; }
.cards span { color: var(--soft); font-size: 13px; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px; }
figure .two { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
figure img, figure video {
  width: 100%; display: block; border-radius: 6px; image-rendering: pixelated; background: var(--line);
}
figure .who { font-size: 12px; color: var(--soft); display: flex; justify-content: space-between; margin-top: 4px; }
figcaption { margin-top: 8px; overflow-wrap: anywhere; max-height: 6.2em; overflow-y: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; }
tr.first td { border-top: 1px solid var(--soft); }
td svg { display: block; }
.role { color: var(--soft); font-size: 13px; }
.up { color: var(--good); } .down { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 14px; }
.chart { padding: 12px 12px 8px; }
.chart h3 { font-size: 13px; font-weight: 600; margin: 0 0 6px; }
.chart svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .half { stroke: var(--soft); stroke-width: 1; }
.mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; opacity: 0.7; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.whisker { stroke-width: 3; stroke-linecap: round; opacity: 0.5; }
.whisker.better { stroke: var(--good); } .whisker.worse { stroke: var(--bad); } .whisker.level { stroke: var(--level); }
.dot.better { fill: var(--good); } .dot.worse { fill: var(--bad); } .dot.level { fill: var(--level); }
.line.s0 { stroke: var(--c0); } .line.s1 { stroke: var(--c1); } .line.s2 { stroke: var(--c2); }
.line.s3 { stroke: var(--c3); } .line.s4 { stroke: var(--c4); } .line.s5 { stroke: var(--c5); }
.dot.s0 { fill: var(--c0); } .dot.s1 { fill: var(--c1); } .dot.s2 { fill: var(--c2); }
.dot.s3 { fill: var(--c3); } .dot.s4 { fill: var(--c4); } .dot.s5 { fill: var(--c5); }
.key.s0 { background: var(--c0); } .key.s1 { background: var(--c1); } .key.s2 { background: var(--c2); }
.key.s3 { background: var(--c3); } .key.s4 { background: var(--c4); } .key.s5 { background: var(--c5); }
.legend { font-size: 12px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 12px; }
.legend .key { display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
details { margin-top: 52px; } summary { cursor: pointer; font-size: 18px; font-weight: 650; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  font-size: 13px; line-height: 1.5; }
footer { color: var(--soft); font-size: 13px; margin-top: 52px; }
"""
