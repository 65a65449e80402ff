"""How the page looks and what it says, in English and Chinese by the browser's language."""

from __future__ import annotations

import gradio as gr

ENGLISH = {
    "model": "Model",
    "placeholder": "### Ask away\nEnter sends, Shift+Enter starts a new line",
    "message": "Message",
    "send": "Send",
    "stop": "Stop",
    "retry": "Retry",
    "clear": "Clear",
    "system": "System prompt",
    "system_hint": "the model's own",
    "temperature": "Temperature (0: always the same)",
    "top_p": "Top-p",
    "max_tokens": "Longest answer (tokens)",
    "seed": "Seed",
    "seed_hint": "random",
}
CHINESE = {
    "model": "模型",
    "placeholder": "### 请提问\n回车发送，Shift+回车换行",
    "message": "输入消息",
    "send": "发送",
    "stop": "停止",
    "retry": "重试",
    "clear": "清空",
    "system": "系统提示",
    "system_hint": "模型自带",
    "temperature": "温度（0：每次相同）",
    "top_p": "Top-p",
    "max_tokens": "最长回答（token）",
    "seed": "随机种子",
    "seed_hint": "随机",
}
WORDS = gr.I18n(**{"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE})

FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
THEME = gr.themes.Soft(
    primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONTS,
    font_mono=["ui-monospace", "Consolas", "monospace"],
)  # fmt: skip

CSS = """
footer { display: none !important; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; padding: 12px 20px !important; }
#top { align-items: center; justify-content: space-between; flex-wrap: nowrap; }
#brand h1 { font-size: 1.25rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#model { max-width: 340px; }
#body { gap: 24px; }
#chat { border: 1px solid var(--border-color-primary); border-radius: 16px; background: var(--background-fill-primary); }
#ask { align-items: end; gap: 8px; }
#send, #stop { height: 42px; border-radius: 12px; }
#below { align-items: center; gap: 8px; min-height: 36px; flex-wrap: nowrap; }
#speed { flex: 1; opacity: 0.7; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
#speed p { font-size: inherit; margin: 0; }
#settings { gap: 14px; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px 10px !important; }
  #body { gap: 12px; }
  #model { max-width: 60vw; }
}
"""
