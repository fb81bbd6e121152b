package sink

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"

	"github.com/klauspost/compress/snappy"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/skerry-io/skerry/tunnel/edgeapi"
)

// MetricName of every series; what it is of is in its labels.
const MetricName = "skerry_device_property"

// remoteWrite speaks Prometheus remote write 1.0. Numbers and booleans travel,
// with the time at which they were so; everything else is passed over. What is
// late the receiver takes only within its out_of_order_time_window.
type remoteWrite struct{ *httpClient }

func newRemoteWrite(cfg Config) (*remoteWrite, error) {
	h, err := newHTTP(cfg, cfg.Spec.RemoteWrite.URL)
	if err != nil {
		return nil, fmt.Errorf("remoteWrite: %w", err)
	}
	h.headers.Set("Content-Type", "application/x-protobuf")
	h.headers.Set("Content-Encoding", "snappy")
	h.headers.Set("X-Prometheus-Remote-Write-Version", "0.1.0")
	return &remoteWrite{h}, nil
}

func (w *remoteWrite) Send(ctx context.Context, records []edgeapi.TelemetryRecord) error {
	body, n := writeRequest(w.cfg.Node, records)
	if n == 0 {
		return nil
	}
	err := w.post(ctx, snappy.Encode(nil, body), http.Header{})
	var st *status
	switch {
	case err == nil:
		return nil
	case errors.As(err, &st) && st.final():
		// A receiver takes what it can of a request and answers with what it
		// could not: there is nothing to send again.
		return &Refused{n, st.Error()}
	}
	return w.retry(err)
}

type series struct{ namespace, device, property string }

type sample struct {
	ts    int64
	value float64
}

// writeRequest encodes prometheus.WriteRequest, and tells how many samples are
// in it.
func writeRequest(node string, records []edgeapi.TelemetryRecord) (body []byte, n int) {
	all := map[series][]sample{}
	var order []series
	for _, r := range records {
		v, ok := number(r.Value)
		if r.Device == nil || r.Gap != nil || !ok {
			continue
		}
		s := series{r.Device.Namespace, r.Device.Name, r.Property}
		if all[s] == nil {
			order = append(order, s)
		}
		all[s] = append(all[s], sample{r.TS, v})
	}
	for _, s := range order {
		samples := all[s]
		// In order and one per time, the last said.
		slices.SortStableFunc(samples, func(a, b sample) int { return cmp.Compare(a.ts, b.ts) })
		kept := samples[:0]
		for _, p := range samples {
			if last := len(kept) - 1; last >= 0 && kept[last].ts == p.ts {
				kept[last] = p
				continue
			}
			kept = append(kept, p)
		}
		n += len(kept)
		body = protowire.AppendTag(body, 1, protowire.BytesType) // timeseries
		body = protowire.AppendBytes(body, encodeSeries(node, s, kept))
	}
	return body, n
}

func encodeSeries(node string, s series, samples []sample) (b []byte) {
	for _, l := range [][2]string{ // sorted by name
		{"__name__", MetricName}, {"device", s.device}, {"namespace", s.namespace}, {"node", node}, {"property", s.property},
	} {
		var label []byte
		label = protowire.AppendTag(label, 1, protowire.BytesType)
		label = protowire.AppendString(label, l[0])
		label = protowire.AppendTag(label, 2, protowire.BytesType)
		label = protowire.AppendString(label, strings.ToValidUTF8(l[1], "?"))
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendBytes(b, label)
	}
	for _, p := range samples {
		var sample []byte
		sample = protowire.AppendTag(sample, 1, protowire.Fixed64Type)
		sample = protowire.AppendFixed64(sample, math.Float64bits(p.value))
		sample = protowire.AppendTag(sample, 2, protowire.VarintType)
		sample = protowire.AppendVarint(sample, uint64(p.ts))
		b = protowire.AppendTag(b, 2, protowire.BytesType)
		b = protowire.AppendBytes(b, sample)
	}
	return b
}

// number reads a JSON number or boolean.
func number(raw json.RawMessage) (float64, bool) {
	switch string(raw) {
	case "true":
		return 1, true
	case "false":
		return 0, true
	case "null", "":
		return 0, false
	}
	var f float64
	if err := json.Unmarshal(raw, &f); err != nil {
		return 0, false
	}
	return f, true
}
