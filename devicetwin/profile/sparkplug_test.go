package profile

import (
	"encoding/json"
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// tahu is sparkplug_b.proto of Eclipse Tahu, as far as it is used here: another
// encoder than the one under test.
func tahu(t testing.TB) (payload, metric protoreflect.MessageDescriptor) {
	t.Helper()
	field := func(name string, num int32, typ descriptorpb.FieldDescriptorProto_Type) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{Name: &name, Number: &num, Type: &typ,
			Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum()}
	}
	const (
		u32, u64 = descriptorpb.FieldDescriptorProto_TYPE_UINT32, descriptorpb.FieldDescriptorProto_TYPE_UINT64
		boolean  = descriptorpb.FieldDescriptorProto_TYPE_BOOL
		str      = descriptorpb.FieldDescriptorProto_TYPE_STRING
		bytes    = descriptorpb.FieldDescriptorProto_TYPE_BYTES
	)
	metrics := field("metrics", 2, descriptorpb.FieldDescriptorProto_TYPE_MESSAGE)
	metrics.Label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED.Enum()
	metrics.TypeName = proto.String(".tahu.Metric")
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("sparkplug_b.proto"), Package: proto.String("tahu"),
		MessageType: []*descriptorpb.DescriptorProto{
			{Name: proto.String("Payload"), Field: []*descriptorpb.FieldDescriptorProto{
				field("timestamp", 1, u64), metrics, field("seq", 3, u64), field("uuid", 4, str), field("body", 5, bytes)}},
			{Name: proto.String("Metric"), Field: []*descriptorpb.FieldDescriptorProto{
				field("name", 1, str), field("alias", 2, u64), field("timestamp", 3, u64), field("datatype", 4, u32),
				field("is_historical", 5, boolean), field("is_transient", 6, boolean), field("is_null", 7, boolean),
				field("int_value", 10, u32), field("long_value", 11, u64),
				field("float_value", 12, descriptorpb.FieldDescriptorProto_TYPE_FLOAT),
				field("double_value", 13, descriptorpb.FieldDescriptorProto_TYPE_DOUBLE),
				field("boolean_value", 14, boolean), field("string_value", 15, str), field("bytes_value", 16, bytes)}},
		},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return file.Messages().ByName("Payload"), file.Messages().ByName("Metric")
}

// tahuPayload encodes {"timestamp":…,"seq":…,"metrics":[{"name":…,"int_value":…}]}.
func tahuPayload(t testing.TB, text string) []byte {
	t.Helper()
	var in struct {
		Timestamp uint64           `json:"timestamp"`
		Seq       *uint64          `json:"seq"`
		Metrics   []map[string]any `json:"metrics"`
	}
	if err := json.Unmarshal([]byte(text), &in); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	payload, metric := tahu(t)
	p := dynamicpb.NewMessage(payload)
	p.Set(payload.Fields().ByName("timestamp"), protoreflect.ValueOfUint64(in.Timestamp))
	if in.Seq != nil {
		p.Set(payload.Fields().ByName("seq"), protoreflect.ValueOfUint64(*in.Seq))
	}
	list := p.Mutable(payload.Fields().ByName("metrics")).List()
	for _, one := range in.Metrics {
		m := dynamicpb.NewMessage(metric)
		for name, v := range one {
			f := metric.Fields().ByName(protoreflect.Name(name))
			if f == nil {
				t.Fatalf("%s: no field %s", text, name)
			}
			var to protoreflect.Value
			switch f.Kind() {
			case protoreflect.Uint32Kind:
				to = protoreflect.ValueOfUint32(uint32(int64(v.(float64))))
			case protoreflect.Uint64Kind:
				to = protoreflect.ValueOfUint64(uint64(int64(v.(float64))))
			case protoreflect.FloatKind:
				to = protoreflect.ValueOfFloat32(float32(v.(float64)))
			case protoreflect.DoubleKind:
				to = protoreflect.ValueOfFloat64(v.(float64))
			case protoreflect.BoolKind:
				to = protoreflect.ValueOfBool(v.(bool))
			case protoreflect.StringKind:
				to = protoreflect.ValueOfString(v.(string))
			case protoreflect.BytesKind:
				to = protoreflect.ValueOfBytes([]byte(v.(string)))
			}
			m.Set(f, to)
		}
		list.Append(protoreflect.ValueOfMessage(m))
	}
	out, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func shownSparkplug(b []byte) string {
	p, err := decodeSparkplug(b)
	if err != nil {
		return err.Error()
	}
	out := "sparkplug"
	for _, m := range p.metrics {
		out += fmt.Sprintf(" %s type %d = %T %v", m.name, m.datatype, m.value, m.value)
	}
	return out
}

// What this package sends is what another decoder reads.
func TestSparkplugWireIsTahus(t *testing.T) {
	payload, metric := tahu(t)
	sent := spPayload{timestamp: 1795245342123, seq: 7, hasSeq: true, metrics: []spMetric{
		{name: "a", datatype: spInt8, value: int64(-5), alias: 3, hasAlias: true},
		{name: "b", datatype: spInt64, value: int64(-1 << 60)},
		{name: "c", datatype: spUInt32, value: int64(1<<32 - 1)},
		{name: "d", datatype: spFloat, value: 21.3},
		{name: "e", datatype: spDouble, value: 21.3},
		{name: "f", datatype: spBoolean, value: true},
		{name: "g", datatype: spString, value: "text"},
		{name: "h", datatype: spBytes, value: []byte{0, 255}},
		{name: "i", datatype: spInt32, null: true},
	}}
	got := dynamicpb.NewMessage(payload)
	if err := proto.Unmarshal(encodeSparkplug(sent), got); err != nil {
		t.Fatal(err)
	}
	list := got.Get(payload.Fields().ByName("metrics")).List()
	for i, want := range []struct{ field, value string }{
		{"int_value", "4294967291"}, {"long_value", "17293822569102704640"}, {"long_value", "4294967295"},
		{"float_value", "21.3"}, {"double_value", "21.3"}, {"boolean_value", "true"}, {"string_value", "text"},
		{"bytes_value", "[0 255]"}, {"is_null", "true"},
	} {
		f := metric.Fields().ByName(protoreflect.Name(want.field))
		m := list.Get(i).Message()
		if s := m.Get(f).String(); !m.Has(f) || s != want.value {
			t.Errorf("metric %d: %s = %q, want %q", i, want.field, s, want.value)
		}
	}
	back, err := decodeSparkplug(encodeSparkplug(sent))
	if err != nil || back.seq != 7 || len(back.metrics) != len(sent.metrics) {
		t.Fatalf("decoded: %+v, %v", back, err)
	}
	if v := back.metrics[0].value; v != int64(-5) {
		t.Errorf("int8 came back as %T %v", v, v)
	}
	if v := back.metrics[3].value; v != 21.3 {
		t.Errorf("float came back as %v", v)
	}
	whole := encodeSparkplug(sent)
	for i := range whole {
		_, _ = decodeSparkplug(whole[:i]) // cut off anywhere: no panic
	}
}

func FuzzSparkplug(f *testing.F) {
	f.Add(encodeSparkplug(spPayload{timestamp: 1, seq: 3, hasSeq: true, metrics: []spMetric{{name: "x", alias: 1, hasAlias: true, datatype: spInt8, value: int64(-1)}}}))
	f.Add(encodeSparkplug(spPayload{metrics: []spMetric{{name: "y", datatype: spDouble, value: 1.5, historical: true}}}))
	f.Add([]byte{0x12, 0x05, 0x0a})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decodeSparkplug(b)
		if err != nil {
			return
		}
		again, err := decodeSparkplug(encodeSparkplug(p))
		if err != nil {
			t.Fatalf("what was encoded does not decode: %v", err)
		}
		if len(again.metrics) != len(p.metrics) || again.seq != p.seq {
			t.Fatalf("%+v became %+v", p, again)
		}
	})
}
