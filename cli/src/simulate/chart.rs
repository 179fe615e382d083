//! Replicas and requests over time, as SVG: two panels for each variation and service.

use std::error::Error;

use pilotlight_coordinator::simulate::{Outcome, PanicPeriod, Point, ServiceOutcome};
use plotters::{
    coord::Shift,
    prelude::{
        AreaSeries, BLACK, ChartBuilder, Color as _, DrawingArea, IntoDrawingArea as _, IntoFont as _, LineSeries,
        PathElement, RGBColor, Rectangle, SVGBackend, SeriesLabelPosition, WHITE,
    },
};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

const WIDTH: u32 = 1000;
const PANEL: u32 = 210;
const READY: RGBColor = RGBColor(0x1b, 0x7f, 0x4d);
const STARTING: RGBColor = RGBColor(0xd9, 0x8e, 0x04);
const WANTED: RGBColor = RGBColor(0x20, 0x4a, 0x87);
const WAITING: RGBColor = RGBColor(0xb3, 0x2d, 0x2e);
const RUNNING: RGBColor = RGBColor(0x55, 0x57, 0x53);
const PANIC: RGBColor = RGBColor(0xf2, 0xb8, 0xb5);

/// Points of a curve at most: more than the picture has columns would only make it large.
const POINTS_MOST: usize = 480;

/// Of several points one: the last, with the most that waited and ran.
fn thinned(timeline: &[Point]) -> Vec<Point> {
    let chunk = timeline.len().div_ceil(POINTS_MOST).max(1);
    let of = |points: &[Point]| {
        let last = points.last().copied().unwrap_or_default();
        let most = |value: fn(&Point) -> usize| points.iter().map(value).max().unwrap_or(0);
        Point { waiting: most(|p| p.waiting), running: most(|p| p.running), ..last }
    };
    timeline.chunks(chunk).map(of).collect()
}

/// What is drawn of one service.
struct Panel<'a> {
    title: String,
    panic: &'a [PanicPeriod],
    points: Vec<Point>,
}

impl<'a> Panel<'a> {
    fn of(variation: &str, service: &'a ServiceOutcome) -> Self {
        let title = format!("{}, {variation}", service.service);
        Self { title, panic: &service.panic, points: thinned(&service.timeline) }
    }

    /// Minutes, and the largest of some value, with room above it.
    fn ranges(&self, value: impl Fn(&Point) -> f64) -> (f64, f64) {
        let minutes = self.points.last().map_or(1.0, |point| point.seconds / 60.0);
        let most = self.points.iter().map(value).fold(1.0, f64::max);
        (minutes, most * 1.15)
    }

    fn line(&self, value: fn(&Point) -> f64) -> impl Iterator<Item = (f64, f64)> {
        self.points.iter().map(move |point| (point.seconds / 60.0, value(point)))
    }
}

/// The picture of all variations, below one another.
pub fn svg(outcomes: &[(String, Outcome)]) -> Result<String, Box<dyn Error>> {
    let panels: Vec<Panel<'_>> = outcomes
        .iter()
        .flat_map(|(variation, outcome)| outcome.services.iter().map(|service| Panel::of(variation, service)))
        .collect();
    let mut text = String::new();
    {
        let height = PANEL * 2 * panels.len() as u32;
        let root = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        for (panel, area) in panels.iter().zip(root.split_evenly((panels.len(), 1))) {
            let (upper, lower) = area.split_vertically(PANEL);
            replicas(&upper, panel)?;
            requests(&lower, panel)?;
        }
        root.present()?;
    }
    Ok(text)
}

fn replicas(area: &Area<'_>, panel: &Panel<'_>) -> Drawn {
    let (minutes, most) = panel.ranges(|point| f64::from(point.wanted.max(point.ready + point.starting)));
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 15).into_font())
        .margin(6)
        .x_label_area_size(4)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..minutes, 0.0..most)?;
    chart
        .draw_series(panel.panic.iter().map(|period| {
            Rectangle::new([(period.from / 60.0, 0.0), (period.until / 60.0, most)], PANIC.mix(0.6).filled())
        }))?
        .label("panic")
        .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], PANIC.filled()));
    chart.configure_mesh().disable_x_mesh().x_labels(0).y_desc("replicas").label_style(("sans-serif", 11)).draw()?;
    chart
        .draw_series(AreaSeries::new(panel.line(|p| f64::from(p.ready + p.starting)), 0.0, STARTING.mix(0.5)))?
        .label("loading")
        .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], STARTING.mix(0.5).filled()));
    chart
        .draw_series(AreaSeries::new(panel.line(|p| f64::from(p.ready)), 0.0, READY.mix(0.7)))?
        .label("ready")
        .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], READY.mix(0.7).filled()));
    chart
        .draw_series(LineSeries::new(panel.line(|p| f64::from(p.wanted)), WANTED.stroke_width(1)))?
        .label("wanted")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], WANTED));
    legend(&mut chart)
}

fn requests(area: &Area<'_>, panel: &Panel<'_>) -> Drawn {
    let (minutes, most) = panel.ranges(|point| point.waiting.max(point.running) as f64);
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .x_label_area_size(34)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..minutes, 0.0..most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("minutes")
        .y_desc("requests")
        .label_style(("sans-serif", 11))
        .draw()?;
    chart
        .draw_series(AreaSeries::new(panel.line(|p| p.waiting as f64), 0.0, WAITING.mix(0.6)))?
        .label("waiting")
        .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], WAITING.mix(0.6).filled()));
    chart
        .draw_series(LineSeries::new(panel.line(|p| p.running as f64), RUNNING.stroke_width(1)))?
        .label("running")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], RUNNING));
    legend(&mut chart)
}

type Chart<'a> = plotters::chart::ChartContext<
    'a,
    SVGBackend<'a>,
    plotters::prelude::Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn legend<'a>(chart: &mut Chart<'a>) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .label_font(("sans-serif", 11))
        .draw()?;
    Ok(())
}
