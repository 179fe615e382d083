//! Usage, as operators read it.

use std::time::Duration;

use jiff::Timestamp;
use pilotlight_proto::control::v1 as control;
use tonic::Status;

use super::control::{ControlService, status, unavailable};
use crate::{
    reconcile::{routes::duration, view},
    usage::{
        Clock, Gap, Period, Row, UsageState,
        report::{Query, select},
    },
    usage_log,
};

impl ControlService {
    /// Usage that was asked for. What is not stored yet is read first: what is stored meanwhile is in both, and counts
    /// once.
    pub(super) async fn usage(&self, request: control::ListUsageRequest) -> Result<control::ListUsageResponse, Status> {
        let period = period(request.period())?;
        let query = Query {
            from: moment(request.from)?.unwrap_or(Clock::MIN),
            to: moment(request.to)?.unwrap_or(Clock::MAX),
            period,
            namespace: request.namespace,
        };
        let live = self.handle.usage().await.map_err(status)?;
        let complete_until = live.complete_until;
        let stored = usage_log::read(&*self.store).await.map_err(unavailable)?;
        let report = select(&query, stored, live);
        Ok(control::ListUsageResponse {
            usage: report.rows.into_iter().map(usage).collect(),
            gaps: report.gaps.into_iter().map(gap).collect(),
            complete_until: Some(time(complete_until)),
        })
    }
}

fn period(period: control::UsagePeriod) -> Result<Period, Status> {
    Ok(match period {
        control::UsagePeriod::Minute => Period::Minute,
        control::UsagePeriod::Unspecified | control::UsagePeriod::Hour => Period::Hour,
        control::UsagePeriod::Day => Period::Day,
        control::UsagePeriod::Month => Period::Month,
    })
}

fn moment(time: Option<prost_types::Timestamp>) -> Result<Option<Clock>, Status> {
    let Some(time) = time else { return Ok(None) };
    let invalid = |error: jiff::Error| Status::invalid_argument(format!("time {}: {error}", time.seconds));
    Ok(Some(Timestamp::new(time.seconds, time.nanos).map_err(invalid)?.as_millisecond()))
}

fn time(time: Clock) -> prost_types::Timestamp {
    view::timestamp(Timestamp::from_millisecond(time).unwrap_or_default())
}

/// Times of rows that correct others may be negative in one period; gRPC's durations may be, too.
fn signed(micros: i64) -> prost_types::Duration {
    let time = duration(Duration::from_micros(micros.unsigned_abs()));
    let sign = micros.signum();
    prost_types::Duration { seconds: time.seconds * sign, nanos: time.nanos * sign as i32 }
}

fn usage(row: Row) -> control::Usage {
    let (amounts, series) = (row.amounts, &row.series);
    let period = match row.period {
        Period::Minute => control::UsagePeriod::Minute,
        Period::Hour => control::UsagePeriod::Hour,
        Period::Day => control::UsagePeriod::Day,
        Period::Month => control::UsagePeriod::Month,
    };
    control::Usage {
        namespace: series.workload.namespace.clone(),
        service: series.workload.service.clone(),
        revision: series.workload.revision.clone(),
        labels: series.workload.labels.clone().into_iter().collect(),
        gpu_class: series.gpu_class.clone(),
        state: series.state.to_string(),
        hour: Some(time(row.start)),
        period: period.into(),
        replica_time: Some(signed(amounts.replica_ms * 1000)),
        gpu_time: Some(signed(amounts.gpu_us)),
        started_minutes: amounts.minutes,
        gpu_millis_minutes: amounts.gpu_millis_minutes,
        cpu_millis_minutes: amounts.cpu_millis_minutes,
        memory_mib_minutes: amounts.memory_mib_minutes,
        requests: amounts.requests,
        prompt_tokens: amounts.prompt_tokens,
        generated_tokens: amounts.generated_tokens,
        requests_without_usage: amounts.requests_without_usage,
    }
}

fn gap(gap: Gap) -> control::UsageGap {
    control::UsageGap {
        namespace: gap.workload.namespace,
        service: gap.workload.service,
        revision: gap.workload.revision,
        labels: gap.workload.labels.into_iter().collect(),
        gpu_class: gap.gpu_class,
        replica: gap.replica,
        node: gap.node,
        from: Some(time(gap.from)),
        to: Some(time(gap.to)),
        reason: gap.reason.name().to_owned(),
        state: UsageState::name(gap.state).to_owned(),
        gpu_millis: gap.gpu_millis,
        open: gap.open,
    }
}
