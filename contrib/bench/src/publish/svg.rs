//! SVG as text: elements, escaping, and the style that all plots share, for a light and a dark page.

use std::fmt::{Display, Write};

/// Colours of lines and bars, and of text, by class: the picture looks right by itself, in an `<img>` and
/// inline, and where CSS variables are not known. Told apart by the colour-blind as well; names are next to the lines.
const STYLE: &str = "\
.bg{fill:#fff}.ink{fill:#1f2328}.dim{fill:#656d76}.grid{stroke:#d8dee4}.axis{stroke:#8c959f}\
.c0{color:#0969da}.c1{color:#cf5a00}.c2{color:#57606a}.c3{color:#1a7f37}.c4{color:#8250df}.c5{color:#bf3989}\
.line{fill:none;stroke:currentColor;stroke-width:2}.whisker{stroke:currentColor;stroke-width:1.5;opacity:.6}\
.dot,.bar{fill:currentColor;stroke:currentColor}.noisy{fill:#fff}.over{stroke:#1f2328;opacity:.7}\
text{font-family:system-ui,sans-serif}\
@media(prefers-color-scheme:dark){.bg{fill:#0d1117}.ink{fill:#e6edf3}.dim{fill:#9198a1}.grid{stroke:#2d333b}\
.axis{stroke:#656c76}.c0{color:#4493f8}.c1{color:#f0883e}.c2{color:#9198a1}.c3{color:#3fb950}.c4{color:#ab7df8}\
.c5{color:#db61a2}.noisy{fill:#0d1117}.over{stroke:#e6edf3}}";

/// Number of colours.
pub const COLOURS: usize = 6;

/// Where a text stands relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// It is centred there.
    Middle,
    /// It ends there.
    End,
}

/// A picture being drawn.
#[derive(Debug)]
pub struct Svg {
    text: String,
}

/// Text inside an element or attribute. Characters that XML does not allow at all become a question mark.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

impl Svg {
    /// A picture of so many pixels, with a title for those who cannot see it.
    pub fn new(width: f64, height: f64, title: &str) -> Self {
        let title = escape(title);
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n<rect class=\"bg\" width=\"{width}\" height=\"{height}\"/>\n"
        );
        Self { text }
    }

    fn put(&mut self, line: impl Display) {
        writeln!(self.text, "{line}").expect("a String takes everything");
    }

    /// A straight line.
    pub fn line(&mut self, class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) {
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    /// A line through points.
    pub fn path(&mut self, class: &str, points: &[[f64; 2]]) {
        let points: Vec<String> = points.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        self.put(format_args!("<polyline class=\"{class}\" points=\"{}\"/>", points.join(" ")));
    }

    /// A dot with a text shown when pointed at.
    pub fn dot(&mut self, class: &str, [x, y]: [f64; 2], tip: &str) {
        let tip = escape(tip);
        self.put(format_args!(
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"><title>{tip}</title></circle>"
        ));
    }

    /// A rectangle with a text shown when pointed at.
    pub fn rect(&mut self, class: &str, [x, y]: [f64; 2], [w, h]: [f64; 2], tip: &str) {
        let tip = escape(tip);
        self.put(format_args!(
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\"><title>{tip}\
             </title></rect>"
        ));
    }

    /// A text; `turn` in degrees around its point.
    pub fn text(
        &mut self,
        class: &str,
        size: u32,
        anchor: Anchor,
        at: [f64; 2],
        turn: i32,
        text: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let ([x, y], text) = (at, escape(text));
        let turn = if turn == 0 {
            String::new()
        } else {
            format!(" transform=\"rotate({turn} {x:.1} {y:.1})\"")
        };
        self.put(format_args!(
            "<text class=\"{class}\" font-size=\"{size}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\"{turn}>\
             {text}</text>"
        ));
    }

    /// The whole.
    pub fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }
}
