//! Two kinds of charts: lines over an axis, and bars in groups; medians with whiskers from the least to the
//! most. A hollow dot or bar is a run that others disturbed.

use super::svg::{Anchor, COLOURS, Svg};
use crate::results::Spread;

const WIDTH: f64 = 760.0;
/// Of the area of the curves: left, right, top, bottom.
const AREA: [f64; 4] = [78.0, 740.0, 74.0, 360.0];
/// Characters of a line of the foot.
const FOOT_CHARS: usize = 128;
const FOOT_STEP: f64 = 13.0;

/// One value.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Number of its category; or where it is on a logarithmic axis.
    pub x: f64,
    /// What was measured.
    pub y: Spread,
    /// Others disturbed it.
    pub noisy: bool,
}

/// A line, or the bars of one colour.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Its colour's number: the same back end has the same one in all plots.
    pub colour: usize,
    /// Its points, from left to right.
    pub points: Vec<Point>,
}

/// What the horizontal axis is.
#[derive(Clone, Debug)]
pub enum Axis {
    /// Values side by side.
    Categories(Vec<String>),
    /// Powers of ten between two values.
    Log(f64, f64),
}

/// A plot.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Of its file.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// Horizontal axis and its name.
    pub x: (Axis, String),
    /// Name of the vertical axis.
    pub y: String,
    /// Bars, not lines.
    pub bars: bool,
    /// Ratios: bars begin at one, twice as much is as far from there as half as much.
    pub ratios: bool,
    /// What is drawn.
    pub lines: Vec<Line>,
    /// Machine, kernel, versions, date, command line.
    pub foot: Vec<String>,
}

/// The vertical axis.
struct Scale {
    /// From the lowest to the highest.
    ticks: Vec<f64>,
    /// Where bars begin. Other than 0: the scale is logarithmic.
    base: f64,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let [.., above, below] = AREA;
        let place = |v: f64| if self.base > 0.0 { v.max(f64::MIN_POSITIVE).log2() } else { v };
        let (low, high) = (place(self.ticks[0]), place(self.ticks[self.ticks.len() - 1]));
        below - (below - above) * ((place(value) - low) / (high - low)).clamp(0.0, 1.0)
    }
}

/// A number with few digits: 950, 12.5k, 3.2M.
pub fn short(value: f64) -> String {
    let trim = |v: f64, unit: &str| {
        let text = if v >= 100.0 { format!("{v:.0}") } else { format!("{v:.2}") };
        let text = if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.')
        } else {
            &text
        };
        format!("{text}{unit}")
    };
    match value {
        v if v >= 1e6 => trim(v / 1e6, "M"),
        v if v >= 1e4 => trim(v / 1e3, "k"),
        v => trim(v, ""),
    }
}

/// A round step that cuts `0..max` into about five parts.
fn step(max: f64) -> f64 {
    let rough = max.max(f64::MIN_POSITIVE) / 5.0;
    let power = 10_f64.powf(rough.log10().floor());
    let digit = rough / power;
    let round = [1.0, 2.0, 2.5, 5.0].into_iter().find(|r| digit <= *r).unwrap_or(10.0);
    round * power
}

/// Cut where a line of the foot ends: at a space if there is one.
fn wrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        // What is not a word but a whole command line is cut anywhere.
        let chars: Vec<char> = word.chars().collect();
        for piece in chars.chunks(FOOT_CHARS).map(|c| c.iter().collect::<String>()) {
            let last = lines.last_mut().expect("never empty");
            if !last.is_empty() && last.chars().count() + 1 + piece.chars().count() > FOOT_CHARS {
                lines.push(piece);
            } else {
                if !last.is_empty() {
                    last.push(' ');
                }
                last.push_str(&piece);
            }
        }
    }
    lines
}

impl Chart {
    /// Whether there is anything to see.
    pub fn is_empty(&self) -> bool {
        self.lines.iter().all(|l| l.points.is_empty())
    }

    fn at(&self, x: f64) -> f64 {
        let [left, right, ..] = AREA;
        match &self.x.0 {
            Axis::Categories(names) => {
                left + (right - left) * (x + 0.5) / names.len().max(1) as f64
            }
            Axis::Log(min, max) => {
                let share = (x.log10() - min.log10()) / (max.log10() - min.log10());
                left + (right - left) * share.clamp(0.0, 1.0)
            }
        }
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let foot: Vec<String> = self.foot.iter().flat_map(|line| wrap(line)).collect();
        let slanted =
            matches!(&self.x.0, Axis::Categories(names) if names.iter().any(|n| n.len() > 8));
        let below = if slanted { 96.0 } else { 48.0 };
        let height = AREA[3] + below + FOOT_STEP * foot.len() as f64 + 8.0;
        let mut svg = Svg::new(WIDTH, height, &self.title);
        svg.text("ink", 17, Anchor::Start, [16.0, 26.0], 0, &self.title);
        self.legend(&mut svg);
        let scale = self.scale();
        self.axes(&mut svg, &scale, slanted);
        for (i, line) in self.lines.iter().enumerate() {
            if self.bars {
                self.draw_bars(&mut svg, i, line, &scale);
            } else {
                self.draw_line(&mut svg, line, &scale);
            }
        }
        for (i, line) in foot.iter().enumerate() {
            let y = AREA[3] + below + FOOT_STEP * (i as f64 + 0.5);
            svg.text("dim", 10, Anchor::Start, [16.0, y], 0, line);
        }
        svg.finish()
    }

    fn scale(&self) -> Scale {
        let all = || self.lines.iter().flat_map(|l| &l.points).map(|p| p.y);
        let largest = all().map(|y| y.max.max(y.median)).fold(0.0, f64::max);
        if self.ratios {
            let smallest = all().map(|y| y.min.min(y.median)).filter(|y| *y > 0.0);
            let low = smallest.fold(0.5, f64::min).log2().floor() as i32;
            let high = largest.max(2.0).log2().ceil() as i32;
            return Scale { ticks: (low..=high).map(|n| 2_f64.powi(n)).collect(), base: 1.0 };
        }
        let step = step(largest);
        let steps = (largest / step).ceil().max(1.0) as u32;
        Scale { ticks: (0..=steps).map(|n| f64::from(n) * step).collect(), base: 0.0 }
    }

    fn legend(&self, svg: &mut Svg) {
        let mut x = 16.0;
        for line in self.lines.iter().filter(|l| !l.points.is_empty()) {
            let class = format!("bar c{}", line.colour % COLOURS);
            svg.rect(&class, [x, 40.0], [12.0, 12.0], &line.name);
            svg.text("ink", 12, Anchor::Start, [x + 18.0, 51.0], 0, &line.name);
            x += 40.0 + 7.0 * line.name.chars().count() as f64;
        }
    }

    fn axes(&self, svg: &mut Svg, scale: &Scale, slanted: bool) {
        let [left, right, above, bottom] = AREA;
        for value in &scale.ticks {
            let y = scale.at(*value);
            svg.line("grid", [left, y], [right, y]);
            svg.text("dim", 11, Anchor::End, [left - 6.0, y + 4.0], 0, &short(*value));
        }
        let base = scale.at(scale.base);
        svg.line("axis", [left, base], [right, base]);
        let middle = [20.0, f64::midpoint(above, bottom)];
        svg.text("dim", 12, Anchor::Middle, middle, -90, &self.y);
        let mut tick = |x: f64, text: &str| {
            if slanted {
                svg.text("dim", 11, Anchor::End, [x + 4.0, bottom + 14.0], -35, text);
            } else {
                svg.text("dim", 11, Anchor::Middle, [x, bottom + 16.0], 0, text);
            }
        };
        match &self.x.0 {
            Axis::Categories(names) => {
                names.iter().enumerate().for_each(|(i, name)| tick(self.at(i as f64), name));
            }
            Axis::Log(min, max) => {
                let mut power = 10_f64.powf(min.log10().floor());
                while power <= *max {
                    for value in [power, 2.0 * power, 5.0 * power] {
                        if value >= *min && value <= *max {
                            tick(self.at(value), &short(value));
                        }
                    }
                    power *= 10.0;
                }
            }
        }
        let y = bottom + if slanted { 88.0 } else { 36.0 };
        svg.text("dim", 12, Anchor::Middle, [f64::midpoint(left, right), y], 0, &self.x.1);
    }

    fn draw_line(&self, svg: &mut Svg, line: &Line, scale: &Scale) {
        let colour = format!("c{}", line.colour % COLOURS);
        let points: Vec<[f64; 2]> =
            line.points.iter().map(|p| [self.at(p.x), scale.at(p.y.median)]).collect();
        svg.path(&format!("line {colour}"), &points);
        // A curve of many points needs no dots.
        if matches!(self.x.0, Axis::Log(..)) {
            return;
        }
        for (point, at) in line.points.iter().zip(points) {
            let whisker = format!("whisker {colour}");
            svg.line(&whisker, [at[0], scale.at(point.y.min)], [at[0], scale.at(point.y.max)]);
            let noisy = if point.noisy { " noisy" } else { "" };
            svg.dot(&format!("dot {colour}{noisy}"), at, &tip(&line.name, point));
        }
    }

    fn draw_bars(&self, svg: &mut Svg, index: usize, line: &Line, scale: &Scale) {
        let Axis::Categories(names) = &self.x.0 else { return };
        let group = 0.8 * (AREA[1] - AREA[0]) / names.len().max(1) as f64;
        let width = group / self.lines.len().max(1) as f64;
        for point in &line.points {
            let left = self.at(point.x) - group / 2.0 + width * index as f64;
            let (y, base) = (scale.at(point.y.median), scale.at(scale.base));
            let noisy = if point.noisy { " noisy" } else { "" };
            let class = format!("bar c{}{noisy}", line.colour % COLOURS);
            svg.rect(
                &class,
                [left + 1.0, y.min(base)],
                [(width - 2.0).max(1.0), (base - y).abs().max(1.0)],
                &tip(&line.name, point),
            );
            let x = left + width / 2.0;
            svg.line("over", [x, scale.at(point.y.min)], [x, scale.at(point.y.max)]);
        }
    }
}

fn tip(name: &str, point: &Point) -> String {
    let Spread { median, min, max } = point.y;
    let noisy = if point.noisy { ", disturbed" } else { "" };
    format!("{name}: {} ({}..{}){noisy}", short(median), short(min), short(max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_steps() {
        assert_eq!(
            [short(0.0), short(950.0), short(12_500.0), short(3_210_000.0)],
            ["0", "950", "12.5k", "3.21M"]
        );
        for max in [0.7, 1.0, 13.0, 950.0, 1.7e6] {
            let parts = max / step(max);
            assert!((2.0..=5.001).contains(&parts), "{max}: {parts} parts");
        }
    }

    #[test]
    fn long_lines_of_the_foot_are_cut() {
        let lines = wrap(&format!("short {} words", "x".repeat(300)));
        assert!(
            lines.len() >= 3 && lines.iter().all(|l| l.chars().count() <= FOOT_CHARS),
            "{lines:?}"
        );
        assert_eq!(lines.concat().replace(' ', "").len(), 310);
    }
}
