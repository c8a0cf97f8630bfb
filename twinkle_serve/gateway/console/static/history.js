// The last hour of a service: points and events, of which polls fetch the new ones.

const HOUR_S = 3600;

export class History {
  points = [];
  events = [];
  periodS = 5;
  now = 0;

  /** Time of the last point, from which the next report goes on. */
  get since() {
    return this.points.at(-1)?.time ?? 0;
  }

  /** Adds a report of /telemetry. Events after the last point come again with the next one. */
  add(report) {
    this.now = report.now;
    this.periodS = report.period_s;
    this.points.push(...report.points);
    const known = new Set(this.events.map((event) => event.key));
    for (const event of report.events) {
      const keyed = { ...event, key: `${event.time} ${event.kind} ${event.engine} ${event.text}` };
      if (!known.has(keyed.key)) this.events.push(keyed);
    }
    const isNew = (item) => item.time > this.now - HOUR_S;
    if (this.points.length && !isNew(this.points[0])) this.points = this.points.filter(isNew);
    if (this.events.length && !isNew(this.events[0])) this.events = this.events.filter(isNew);
  }

  /** The point at or before a time, unless it is too old to stand for it. */
  at(time) {
    const point = this.points.findLast((each) => each.time <= time + this.periodS / 2);
    return point !== undefined && time - point.time < 3 * this.periodS ? point : undefined;
  }
}
