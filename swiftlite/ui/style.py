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
    "temperature": "Temperature",
    "top_p": "Top-p",
    "max_tokens": "Max tokens",
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
    "temperature": "温度",
    "top_p": "Top-p",
    "max_tokens": "最大 token 数",
    "seed": "随机种子",
    "seed_hint": "随机",
}
WORDS = gr.I18n(**{"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE})

FONTS = ["system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
THEME = gr.themes.Soft(
    primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONTS,
    font_mono=["ui-monospace", "Consolas", "monospace"],
).set(
    block_title_background_fill="transparent", block_title_background_fill_dark="transparent", block_title_padding="0",
    block_title_text_weight="500", block_title_text_size="0.85rem", block_title_text_color="var(--body-text-color)",
    block_title_text_color_dark="var(--body-text-color)", input_border_width="1px", input_shadow="none",
    input_border_color="*neutral_200", input_border_color_dark="*neutral_700", input_background_fill="white",
    body_background_fill="*neutral_50", block_background_fill="white",
    button_large_text_weight="550", button_large_text_size="0.95rem", button_small_text_size="0.82rem",
)  # fmt: skip

CSS = """
footer, #grammar { display: none !important; }
.gradio-container { max-width: 1240px !important; width: 100%; margin: 0 auto !important; padding: 0 !important; }
.gradio-container .app { max-width: none !important; padding: 14px 20px !important; }
#top { align-items: center; justify-content: space-between; flex-wrap: nowrap; }
#top > * { padding: 0 !important; }
#brand, #brand .html-container { padding: 0 !important; }
#brand h1 { font-size: 1.2rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#model { max-width: 340px; border: 1px solid var(--border-color-primary); border-radius: 12px; }
#model input { padding-right: 36px; text-overflow: ellipsis; }
#body { gap: 24px; }
#chat { border: 1px solid var(--border-color-primary); border-radius: 16px; background: var(--block-background-fill); }
#chat .top-panel, #chat .icon-button-wrapper.top-panel { display: none !important; }
#chat .prose, #chat .prose * { color: var(--body-text-color); }
#chat .placeholder-content, #chat .placeholder { text-align: center; }
#chat .examples button, #chat button.example { border: 1px solid var(--border-color-primary); border-radius: 12px; }
#chat .message { font-size: 0.95rem; line-height: 1.6; }
#ask { align-items: end; gap: 8px; }
#message textarea { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 11px 14px; min-height: 44px; }
#send, #stop { height: 44px; border-radius: 12px; }
#below { align-items: center; gap: 8px; min-height: 32px; flex-wrap: nowrap; }
#speed { flex: 1; opacity: 0.7; font-variant-numeric: tabular-nums; }
#speed p { font-size: 0.8rem; margin: 0; }
#settings { gap: 12px; }
#settings .block { border: 1px solid var(--border-color-primary); }
@media (max-width: 640px) {
  .gradio-container .app { padding: 10px 12px !important; }
  #body { gap: 12px; }
  #model { max-width: 60vw; }
}
"""
