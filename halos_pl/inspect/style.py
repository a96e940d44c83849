"""How the page looks, light and dark."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfaf8; --card: #fff; --ink: #1d2126; --dim: #6a7179; --line: #e3e0da;
  --good: #2f7d6b; --bad: #c2603f; --plain: #56708f; --warn: #b26a00; --warn-back: #fff6e5; --note-back: #eef3f8;
  --shade: #e6efe9; --shade-odd: #d3e4da; --read: #f1efeb; --read-odd: #e7e4de; --special: #1f6f9c; --eos: #f2c14e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --ink: #e4e6e8; --dim: #949ca4;
  --line: #31373d; --good: #5fb8a1; --bad: #e08a68; --plain: #8aa8cc; --warn: #f0b455; --warn-back: #2b2417;
  --note-back: #1c2530; --shade: #22332c; --shade-odd: #2c4339; --read: #23272b; --read-odd: #2b3035;
  --special: #74bde6; --eos: #b88a1e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; } header p { margin: .1rem 0 1.2rem; color: var(--dim); }
h2 { font-size: 1.05rem; margin: 0 0 .7rem; } h3 { font-size: .95rem; margin: 1.3rem 0 .5rem;
  overflow-wrap: anywhere; }
h4 { font-size: .8rem; margin: 0 0 .2rem; color: var(--dim); font-weight: 600; }
small { color: var(--dim); font-weight: 400; font-size: .8rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem;
  margin-top: 1.1rem; }
.advice { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
.advice li { border-left: 4px solid var(--plain); background: var(--note-back); border-radius: 6px;
  padding: .5rem .9rem; }
.advice li.warning { border-color: var(--warn); background: var(--warn-back); }
.advice li.fine { border-color: var(--good); }
.advice p { margin: 0; } .remedy { color: var(--dim); font-size: .9rem; } .remedy::before { content: "→ "; }
dl { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  main { padding: 1.2rem .7rem; } section { padding: .9rem; } }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100%; }
th { text-align: right; font-weight: 500; color: var(--dim); padding: .2rem .6rem; }
td { text-align: right; padding: .2rem .6rem; border-top: 1px solid var(--line); }
tbody th { text-align: left; color: var(--ink); border-top: 1px solid var(--line); }
thead th:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; } figcaption { font-size: .82rem; color: var(--dim); margin-bottom: .3rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 10px; fill: var(--dim); }
.bar { fill: var(--plain); } .bar.desirable, .bar.chosen { fill: var(--good); }
.bar.undesirable, .bar.rejected { fill: var(--bad); }
.axis { stroke: var(--line); stroke-width: 1; } .limit { stroke: var(--warn); stroke-width: 1.5;
  stroke-dasharray: 4 3; }
.legend { font-size: .82rem; color: var(--dim); margin: 0; display: flex; gap: .7rem; flex-wrap: wrap;
  align-items: center; }
.tokens { font: 13px/1.65 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  padding: .5rem .7rem; border-radius: 6px; border: 1px solid var(--line); margin-bottom: .7rem; }
article .scored .tokens { border-left: 4px solid var(--plain); }
article .desirable .tokens, article .chosen .tokens { border-left-color: var(--good); }
article .undesirable .tokens, article .rejected .tokens { border-left-color: var(--bad); }
.t { border-radius: 2px; background: var(--shade); } .t.odd { background: var(--shade-odd); }
.prompt .t { background: var(--read); color: var(--dim); } .prompt .t.odd { background: var(--read-odd); }
.t.special, .prompt .t.special { color: var(--special); font-weight: 600; }
.t.eos { background: var(--eos); color: #1d2126; font-weight: 600; }
.newline { color: var(--dim); opacity: .7; } .left-out { color: var(--plain); font-style: italic; padding: 0 .5rem; }
.cut { color: var(--bad); font-weight: 600; } .legend .t { padding: .1rem .4rem; }
"""
